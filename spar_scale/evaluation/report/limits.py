"""The "Limits" section of the report: limits of every miniature run, and warnings computed from this run's scores."""

from __future__ import annotations

from spar_scale.evaluation.report.scores import KINDS
from spar_scale.evaluation.report.sources import ReportData
from spar_scale.evaluation.report.tables import number

FIXED = (
    "This is a miniature: rendered scenes of a few shapes and colours, prompts from a vocabulary of a few dozen words. "
    "The numbers are not comparable with those of the paper; the directions of effects are.",
    "The parts that the paper takes as pretrained were trained here, for minutes (training stage 0).",
    "The judge is a program for these scenes, and strict: it requires every object's shape and colour, its place if "
    "the prompt names one, and no other objects. Its ceiling is its score on reconstructions of true scenes.",
    "The perceptual loss is a difference of image gradients, not LPIPS.",
    "This is one run with one seed. Only the ablation table shows how much seeds differ.",
)
MAX_VQA_LOSS = 0.03  # accepted drop of the share of right answers, from before to after
MIN_CEILING = 0.95
MIN_MIRROR_INCREASE = 0.03  # relative; a model that uses positions has a higher edit loss for a mirrored source

_AGAINST_CONTROL = (
    ("t2i.average", "t2i.control", "Text to image"),
    *((f"t2i.{kind}", f"t2i.control.{kind}", f"Text to image, {name},") for kind, name in KINDS.items()),
    ("vqa.after", "vqa.blind", "Questions"),
    ("edit.exact", "edit.control", "Edits, exact scene,"),
    ("edit.exact", "edit.copy", "Edits, exact scene, compared with an unchanged source:"),
    ("tokenizer.psnr", "tokenizer.psnr_frozen_encoder", "Reconstruction, compared with a frozen encoder:"),
)


def remarks(data: ReportData) -> list[str]:
    """Return warnings about weaknesses that the files of this run show."""
    scores, remarks = data.scores, []
    compared = [entry for entry in _AGAINST_CONTROL if entry[0] in scores and entry[1] in scores]
    for key, control, name in compared:
        if scores[key] <= scores[control]:
            unit = "dB" if key == "tokenizer.psnr" else ""
            score, other = number(scores[key], unit), number(scores[control], unit)
            remarks.append(f"{name} is not above its control: {score} and {other}.")
    if compared and not remarks:
        remarks.append("Every score that has a control in scores.json is above it.")
    if {"flow.right", "flow.shuffled"} <= set(scores) and scores["flow.right"] >= scores["flow.shuffled"]:
        remarks.append("Shuffling the prompts does not raise the held-out loss: the model ignores its prompts.")
    right, mirrored = scores.get("flow.edit.right"), scores.get("flow.edit.mirrored")
    if right is not None and mirrored is not None and mirrored < (1 + MIN_MIRROR_INCREASE) * right:
        remarks.append("Mirroring the source picture hardly raises the loss: edits ignore the positions of objects.")
    before, after = scores.get("vqa.before"), scores.get("vqa.after")
    if before is not None and after is not None and before - after > MAX_VQA_LOSS:
        remarks.append(
            f"Training the tokenizer reduced the share of right answers from {number(before)} to {number(after)}."
        )
    seen_and_unseen = [
        (scores[f"t2i.{kind}"], scores[f"t2i.unseen.{kind}"])
        for kind in KINDS
        if {f"t2i.{kind}", f"t2i.unseen.{kind}"} <= set(scores)
    ]
    if (drop := sum(seen - unseen for seen, unseen in seen_and_unseen)) > 0:
        remarks.append(
            f"Contents held out of training score {number(drop / len(seen_and_unseen))} less than others of their kind."
        )
    ceiling = scores.get("t2i.judge_ceiling")
    if ceiling is not None and ceiling < MIN_CEILING:
        remarks.append(
            f"The judge accepts only {number(ceiling)} of the reconstructions: errors of the judge lower all scores."
        )
    for run in data.runs:
        if skipped := sum(bool(line.get("skipped")) for line in run.metrics):
            remarks.append(
                f"{run.name}: {skipped} of {len(run.metrics)} steps skipped because a loss or gradient was not finite."
            )
    return remarks
