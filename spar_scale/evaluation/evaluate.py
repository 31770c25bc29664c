"""Measure all scores of a chain's trained phases on held-out data, each with its control.

Writes `scores.json` (flat dotted names; existing `core_seconds.*` are kept) and the directory `evaluation/`:
`details.json` with a row per sample, and the picture sheets. A measurement is skipped, with a log line, if a phase that
it needs is not trained. Most of the time is spent on generating pictures.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.errors import UserError
from parallel.files import write_file
from spar_scale.data.shapes_world import World
from spar_scale.evaluation.detector import detect
from spar_scale.evaluation.editing import edit_and_judge
from spar_scale.evaluation.generation import draw_and_judge
from spar_scale.evaluation.held_out import held_out_terms
from spar_scale.evaluation.judge import shows_looks
from spar_scale.evaluation.report.sources import read_scores, root_of
from spar_scale.evaluation.requests import UNSEEN_KINDS, select_requests
from spar_scale.evaluation.scenes import edits_of, scenes_of, world_of
from spar_scale.evaluation.sections import Scores, Section, mean
from spar_scale.evaluation.understanding import accuracy_by_type, compare_answers, held_out_questions, predict_answers
from spar_scale.files.outputs import check_files, make_directory
from spar_scale.inference.routes import route
from spar_scale.models.spar import SamplingShape
from spar_scale.objectives.quality import psnr, ssim
from spar_scale.phases import with_role
from spar_scale.stages.forward import Forward
from spar_scale.stages.parts import preset_of
from spar_scale.training.export import recipe_of, trained_forward

MLLM, TOKENIZER, FINAL = (with_role(role)[-1].name for role in ("mllm", "tokenizer", "final"))
FROZEN = f"{TOKENIZER},encoder=frozen"
EARLIER = tuple(phase.name for phase in with_role("reconstruction"))  # phases with a decoder before the last
SHOWN = 64  # reconstructions and questions that are written with their pictures
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Counts:
    """Numbers of samples that the scores are measured on; fewer if the held-out shards hold fewer."""

    scenes: int = 256
    questions: int = 600
    per_kind: int = 50
    edits: int = 240


QUICK = Counts(scenes=32, questions=32, per_kind=4, edits=8)
Measured = tuple[Scores, dict[str, Section]]


@dataclass(frozen=True)
class Trained:
    """The trained phases of a chain: the directory with their run directories, and how much to measure."""

    root: Path
    counts: Counts

    def has(self, phase: str) -> bool:
        """Return whether a phase was trained at least to its first checkpoint."""
        return (self.root / phase / "recipe.yaml").is_file() and any((self.root / phase / "checkpoints").glob("step-*"))

    @cached_property
    def data(self) -> Path:
        """The directory of the shards: `data` beside the run directories, else the one that a recipe names."""
        if (self.root / "data").is_dir():
            return self.root / "data"
        phase = next(phase for phase in (FINAL, TOKENIZER, MLLM) if self.has(phase))
        return Path(recipe_of(self.root / phase).data.sources[0].shards).parent

    @cached_property
    def world(self) -> World:
        """The settings of the world that the phases were trained on."""
        return world_of(self.data)

    @cached_property
    def tokenizer(self) -> Forward:
        """The unified tokenizer after its last phase."""
        return trained_forward(self.root / TOKENIZER)[0]

    @cached_property
    def final(self) -> Forward:
        """The whole model after the last phase."""
        return trained_forward(self.root / FINAL)[0]

    @property
    def sampling(self) -> SamplingShape:
        """The sampling settings of the last phase's preset."""
        return preset_of(recipe_of(self.root / FINAL)).sampling


def evaluate(root: Path, counts: Counts = Counts()) -> Scores:
    """Measure the phases under `root` (or, if `root` is a run directory, those beside it); write and return the scores.

    Raises UserError before anything is measured if there are no runs or no shards, `scores.json` is damaged, or a
    result cannot be written.
    """
    trained = Trained(root_of(root), counts)
    if not any(trained.has(phase) for needed, _ in MEASUREMENTS.values() for phase in needed):
        raise UserError(
            f"{trained.root}: holds no trained run of {MLLM}, {TOKENIZER} or {FINAL}; expected a directory that"
            " `spar-scale demo` wrote"
        )
    _ = trained.world  # raises UserError if the shards are missing
    folder, path = trained.root / "evaluation", trained.root / "scores.json"
    make_directory(folder)
    check_files(path, folder / "details.json", *(folder / f"{name}.png" for name in MEASUREMENTS))
    durations = {name: value for name, value in read_scores(trained.root).items() if name.startswith("core_seconds.")}
    scores: Scores = {}
    details: dict[str, Any] = {}
    for name, (needed, measure) in MEASUREMENTS.items():
        if missing := [phase for phase in needed if not trained.has(phase)]:
            log.info("evaluation: skipped %s, which needs %s", name, " and ".join(missing))
            continue
        began = time.process_time()
        measured, sections = measure(trained)
        scores |= measured
        details |= {section: content.write(folder, section) for section, content in sections.items()}
        log.info("evaluation: %s took %.0f core-seconds", name, time.process_time() - began)
    scores = {name: round(value, 4) for name, value in scores.items()}
    write_file(folder / "details.json", (json.dumps(details) + "\n"))
    merged = scores | durations
    write_file(path, (json.dumps(merged, indent=1) + "\n"))
    return merged


def _reconstruction(trained: Trained) -> Measured:
    scenes = scenes_of(trained.data, trained.counts.scenes)
    images = torch.stack([scene.image for scene in scenes])
    phases = [*EARLIER, *([FROZEN] if trained.has(FROZEN) else [])]
    outputs = {
        phase: _reconstructed(trained_forward(trained.root / phase)[0], images)
        for phase in phases
        if trained.has(phase)
    }
    outputs[TOKENIZER] = _reconstructed(trained.tokenizer, images)
    decibels = {phase: psnr(pictures, images) for phase, pictures in outputs.items()}
    scores = {f"tokenizer.psnr_{phase}": float(value.mean()) for phase, value in decibels.items() if phase != FROZEN}
    if FROZEN in outputs:
        scores["tokenizer.psnr_frozen_encoder"] = float(decibels[FROZEN].mean())
    scores["tokenizer.psnr"] = scores[f"tokenizer.psnr_{TOKENIZER}"]
    scores["tokenizer.ssim"] = float(ssim(outputs[TOKENIZER], images).mean())
    detected = detect(outputs[TOKENIZER], trained.world.shapes)
    scores["t2i.judge_ceiling"] = mean(
        [shows_looks(scene.objects, objects) for scene, objects in zip(scenes, detected, strict=True)]
    )
    columns = {name: phase for name, phase in (("frozen_encoder", FROZEN), ("ours", TOKENIZER)) if phase in outputs}
    rows = [
        {"psnr": [round(float(decibels[phase][number]), 2) for phase in columns.values()]}
        for number in range(len(images[:SHOWN]))
    ]
    tiles = torch.stack([images[:SHOWN], *(outputs[phase][:SHOWN] for phase in columns.values())], 1)
    return scores, {"reconstruction": Section(rows, ("source", *columns), tiles)}


def _reconstructed(model: Forward, images: Tensor) -> Tensor:
    return torch.cat([model.reconstruct(part) for part in images.split(64)])


def _questions(trained: Trained) -> Measured:
    mllm = trained_forward(trained.root / MLLM)[0]
    size = trained.tokenizer.preset.image_size
    questions = held_out_questions(str(trained.data / "heldout-*.tar"), trained.counts.questions, size)
    encoders = {"before": mllm.features, "after": trained.tokenizer.features, "blind": None}
    predicted = {name: predict_answers(mllm, encode, questions) for name, encode in encoders.items()}
    scores: Scores = {}
    for name, words in predicted.items():
        shares = accuracy_by_type(questions, compare_answers(words, questions))
        scores[f"vqa.{name}"] = shares.pop("all")
        scores |= {f"vqa.{name}.{kind}": share for kind, share in shares.items()}
    rows = [
        {
            "type": q.type,
            "question": q.question,
            "answer": q.answer,
            **{name: words[n] for name, words in predicted.items()},
        }
        for n, q in enumerate(questions[:SHOWN])
    ]
    tiles = torch.stack([q.image for q in questions[:SHOWN]])[:, None]
    return scores, {"questions": Section(rows, ("scene",), tiles)}


def _generation(trained: Trained) -> Measured:
    scores, section = draw_and_judge(trained.final, trained.sampling, trained.world, trained.counts.per_kind)
    return scores, {"generation": section}


def _editing(trained: Trained) -> Measured:
    if not any(trained.data.glob("test-edits-*.tar")):
        log.info("evaluation: skipped editing, %s holds no test-edits-*.tar", trained.data)
        return {}, {}
    edits = edits_of(trained.data, trained.counts.edits)
    scores, section = edit_and_judge(trained.final, trained.sampling, edits, trained.world.shapes)
    return scores, {"editing": section}


def _flow(trained: Trained) -> Measured:
    shards = {"generation": str(trained.data / "heldout-*.tar")}
    scores = {}
    for name, shuffled in (("right", False), ("shuffled", True)):
        terms = held_out_terms(trained.root / FINAL, shards, trained.counts.scenes, shuffled)
        scores[f"flow.{name}"] = float(terms["flow_matching"].mean())
    if any(trained.data.glob("test-edits-*.tar")):
        shards = {"editing": str(trained.data / "test-edits-*.tar")}
        for name, mirrored in (("right", False), ("mirrored", True)):
            terms = held_out_terms(trained.root / FINAL, shards, trained.counts.edits, mirrored=mirrored)
            scores[f"flow.edit.{name}"] = float(terms["flow_matching"].mean())
    return scores, {}


def _routes(trained: Trained) -> Measured:
    rows = []
    for kind in UNSEEN_KINDS:
        prompt = select_requests(trained.world, kind, False, 1)[0].prompt
        routed = route(trained.final, trained.final.text.generation_prompt(prompt))
        queries = [f"query {number + 1}" for number in range(len(routed.weights) - len(routed.words))]
        rows.append(
            {
                "prompt": prompt,
                "tokens": [*routed.words, *queries],
                "layers": list(routed.layers),
                "weights": [[round(weight, 4) for weight in weights] for weights in routed.weights.tolist()],
            }
        )
    return {}, {"routes": Section(rows)}


MEASUREMENTS: dict[str, tuple[tuple[str, ...], Callable[[Trained], Measured]]] = {
    "reconstruction": ((TOKENIZER,), _reconstruction),
    "questions": ((MLLM, TOKENIZER), _questions),
    "generation": ((FINAL,), _generation),
    "editing": ((FINAL,), _editing),
    "flow": ((FINAL,), _flow),
    "routes": ((FINAL,), _routes),
}
"""Name of a measurement -> (the phases that it needs, the function that measures)."""
