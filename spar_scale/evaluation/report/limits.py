"""What a reader must know before believing the numbers: what holds for every miniature, and what this run shows."""

from __future__ import annotations

from spar_scale.evaluation.report.scores import KINDS
from spar_scale.evaluation.report.sources import Found
from spar_scale.evaluation.report.tables import number

FIXED = (
    "A miniature: drawn scenes of a few shapes and colours, prompts of a few dozen words. No number here can be held "
    "against one of the paper; directions can.",
    "The parts that the paper takes as pretrained were trained here, for minutes (stage 0).",
    "The judge is a program for these scenes, and strict: every object's shape and colour, its place where it is "
    "named, none too many. Its ceiling is its score on reconstructions of true scenes.",
    "The perceptual loss is a difference of gradients, not LPIPS.",
    "One run of one seed. How much seeds differ stands in the ablation table only.",
)
FALL = 0.03  # of the questions answered right, from before to after
CEILING = 0.95
PLACED = 0.03  # of the loss of edits, that a mirrored source must add where places are heeded

_AGAINST_CONTROL = (
    ("t2i.average", "t2i.control", "Text to image"),
    *((f"t2i.{kind}", f"t2i.control.{kind}", f"Text to image, {name},") for kind, name in KINDS.items()),
    ("vqa.after", "vqa.blind", "Questions"),
    ("edit.exact", "edit.control", "Edits, exact scene,"),
    ("edit.exact", "edit.copy", "Edits, exact scene, against leaving the source as it is:"),
    ("tokenizer.psnr", "tokenizer.psnr_frozen_encoder", "Reconstruction, against a frozen encoder:"),
)


def remarks(found: Found) -> list[str]:
    """Return what this run's own files say against it."""
    scores, said = found.scores, []
    compared = [entry for entry in _AGAINST_CONTROL if entry[0] in scores and entry[1] in scores]
    for key, control, name in compared:
        if scores[key] <= scores[control]:
            unit = "dB" if key == "tokenizer.psnr" else ""
            score, other = (number(scores[one], unit) for one in (key, control))
            said.append(f"{name} is not above its control: {score} and {other}.")
    if compared and not said:
        said.append("Every score that has a control in scores.json is above it.")
    if {"flow.right", "flow.shuffled"} <= set(scores) and scores["flow.right"] >= scores["flow.shuffled"]:
        said.append("Shuffling the prompts does not raise the held-out loss: the model does not listen to them.")
    right, mirrored = scores.get("flow.edit.right"), scores.get("flow.edit.mirrored")
    if right is not None and mirrored is not None and mirrored < (1 + PLACED) * right:
        said.append("Mirroring the picture to edit hardly raises the loss: edits do not heed where things stand.")
    before, after = scores.get("vqa.before"), scores.get("vqa.after")
    if before is not None and after is not None and before - after > FALL:
        said.append(f"Training the tokenizer cost answers: {number(before)} right before, {number(after)} after.")
    both = [
        (scores[f"t2i.{kind}"], scores[f"t2i.unseen.{kind}"])
        for kind in KINDS
        if {f"t2i.{kind}", f"t2i.unseen.{kind}"} <= set(scores)
    ]
    if (fall := sum(seen - unseen for seen, unseen in both)) > 0:
        said.append(
            f"Contents that training never showed score {number(fall / len(both))} less than others of their kind."
        )
    ceiling = scores.get("t2i.judge_ceiling")
    if ceiling is not None and ceiling < CEILING:
        said.append(
            f"The judge itself passes only {number(ceiling)} of the reconstructions: its misses count as the model's."
        )
    for run in found.runs:
        if skipped := sum(bool(line.get("skipped")) for line in run.metrics):
            said.append(
                f"{run.name}: {skipped} of {len(run.metrics)} steps skipped for a loss or gradient that was not finite."
            )
    return said
