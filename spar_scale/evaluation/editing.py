"""Editing accuracy: the share of edits that do exactly what the instruction says, by operation.

Scores: `exact` requires every object of the target in its place and no other object; `objects` requires the right
shapes and colours in any place; `psnr` is the distance to the target picture. References: `copy` is the score of the
unchanged source; `control` judges the same pictures by the next target of the same operation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spar_scale.evaluation.detector import detect
from spar_scale.evaluation.judge import shows_looks, shows_scene
from spar_scale.evaluation.scenes import HeldOutEdit
from spar_scale.evaluation.sections import Scores, Section, mean
from spar_scale.inference.drawing import edit
from spar_scale.inference.sampler import seeded_noise
from spar_scale.models.spar import SamplingShape
from spar_scale.objectives.quality import psnr
from spar_scale.stages.forward import Forward

BATCH = 64


def edit_and_judge(
    model: Forward, sampling: SamplingShape, edits: Sequence[HeldOutEdit], shapes: Sequence[str]
) -> tuple[Scores, Section]:
    """Apply every instruction and judge the result: scores edit.*, and a row per edit."""
    sources, targets = (torch.stack([getattr(e, side) for e in edits]) for side in ("source", "target"))
    edited = []
    for first in range(0, len(edits), BATCH):
        part = slice(first, first + BATCH)
        noise = seeded_noise(model.preset.latent_shape, range(len(edits))[part])
        edited.append(edit(model, sources[part], [e.instruction for e in edits[part]], noise, sampling))
    drawn = torch.cat(edited)
    size = drawn.shape[-1]
    detected, unchanged = detect(drawn, shapes), detect(sources, shapes)
    decibels = psnr(drawn, targets).tolist()
    rows = [
        {
            "instruction": e.instruction,
            "kind": e.kind,
            "exact": shows_scene(e.objects, detected[number], size),
            "objects": shows_looks(e.objects, detected[number]),
            "psnr": round(decibels[number], 2),
        }
        for number, e in enumerate(edits)
    ]
    other_edits = [next_edit_of_kind(edits, number) for number in range(len(edits))]
    scores = {f"edit.{name}": mean([row[name] for row in rows]) for name in ("exact", "objects", "psnr")}
    scores["edit.copy"] = mean([shows_scene(e.objects, d, size) for e, d in zip(edits, unchanged, strict=True)])
    scores["edit.control"] = mean([shows_scene(e.objects, d, size) for e, d in zip(other_edits, detected, strict=True)])
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of_kind = [row for row in rows if row["kind"] == kind]
        scores |= {f"edit.{name}.{kind}": mean([row[name] for row in of_kind]) for name in ("exact", "objects", "psnr")}
    return scores, Section(rows, ("source", "target", "ours"), torch.stack([sources, targets, drawn], 1))


def next_edit_of_kind(edits: Sequence[HeldOutEdit], number: int) -> HeldOutEdit:
    """Return the next edit of the same operation (after the last edit comes the first)."""
    following = (*edits[number + 1 :], *edits[: number + 1])
    return next(e for e in following if e.kind == edits[number].kind)
