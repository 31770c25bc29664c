"""How often a model does what an instruction says, and nothing else: verdicts by operation.

`exact`: every object of the target stands in its place, and no other; `objects`: the right shapes and colours,
wherever they stand. Beside them the distance to the target picture; `copy`, what leaving the picture as it is
would reach; and the control, the same pictures judged by the next target of the same operation.
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
    """Follow every instruction and judge the result: scores edit.*, and a row for each edit."""
    sources, targets = (torch.stack([getattr(e, side) for e in edits]) for side in ("source", "target"))
    made = []
    for first in range(0, len(edits), BATCH):
        part = slice(first, first + BATCH)
        noise = seeded_noise(model.preset.latent_shape, range(len(edits))[part])
        made.append(edit(model, sources[part], [e.instruction for e in edits[part]], noise, sampling))
    drawn = torch.cat(made)
    size = drawn.shape[-1]
    found, unchanged = detect(drawn, shapes), detect(sources, shapes)
    near = psnr(drawn, targets).tolist()
    rows = [
        {
            "instruction": e.instruction,
            "kind": e.kind,
            "exact": shows_scene(e.objects, found[number], size),
            "objects": shows_looks(e.objects, found[number]),
            "psnr": round(near[number], 2),
        }
        for number, e in enumerate(edits)
    ]
    following = [next_of_kind(edits, number) for number in range(len(edits))]
    scores = {f"edit.{name}": mean([row[name] for row in rows]) for name in ("exact", "objects", "psnr")}
    scores["edit.copy"] = mean([shows_scene(e.objects, f, size) for e, f in zip(edits, unchanged, strict=True)])
    scores["edit.control"] = mean([shows_scene(e.objects, f, size) for e, f in zip(following, found, strict=True)])
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of_kind = [row for row in rows if row["kind"] == kind]
        scores |= {f"edit.{name}.{kind}": mean([row[name] for row in of_kind]) for name in ("exact", "objects", "psnr")}
    return scores, Section(rows, ("source", "target", "ours"), torch.stack([sources, targets, drawn], 1))


def next_of_kind(edits: Sequence[HeldOutEdit], number: int) -> HeldOutEdit:
    """The next edit, in the circle of all, of the same operation."""
    following = (*edits[number + 1 :], *edits[: number + 1])
    return next(e for e in following if e.kind == edits[number].kind)
