"""How often a model draws what it is asked for: strict verdicts by kind of prompt, of seen and of unseen contents.

Each picture has a seed of its own. The control judges the same pictures by the next other prompt of their kind:
what a model that does not listen would reach with these pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spar_scale.data.shapes_world import World
from spar_scale.evaluation.detector import detect
from spar_scale.evaluation.judge import fulfils
from spar_scale.evaluation.requests import KINDS, UNSEEN_KINDS, Request, requests
from spar_scale.evaluation.sections import Scores, Section, mean
from spar_scale.inference.drawing import generate
from spar_scale.inference.sampler import seeded_noise
from spar_scale.models.spar import SamplingShape
from spar_scale.stages.forward import Forward

BATCH = 64


def draw_and_judge(model: Forward, sampling: SamplingShape, world: World, per_kind: int) -> tuple[Scores, Section]:
    """Draw `per_kind` prompts of each kind and judge them: scores t2i.*, and a row for each picture."""
    groups = {(kind, unseen): requests(world, kind, unseen, per_kind) for unseen in (False, True) for kind in KINDS}
    asked = [request for group in groups.values() for request in group]
    pictures = []
    for first in range(0, len(asked), BATCH):
        part = [request.prompt for request in asked[first : first + BATCH]]
        noise = seeded_noise(model.preset.latent_shape, range(first, first + len(part)))
        pictures.append(generate(model, part, noise, sampling))
    drawn = torch.cat(pictures)
    found, size = detect(drawn, world.shapes), drawn.shape[-1]
    scores, rows, control = {}, [], {}
    for (kind, unseen), group in groups.items():
        if not group:
            continue
        first = len(rows)
        for number, request in enumerate(group):
            seen, other = found[first + number], another(group, number)
            rows.append(
                {
                    "prompt": request.prompt,
                    "kind": kind,
                    "unseen": unseen,
                    "passed": fulfils(request, seen, size),
                    "control_passed": other is not None and fulfils(other, seen, size),
                    "found": [o.as_json() for o in seen],
                    "seed": first + number,
                }
            )
        scores[f"t2i.{'unseen.' if unseen else ''}{kind}"] = mean([row["passed"] for row in rows[first:]])
        if not unseen:
            control[f"t2i.control.{kind}"] = mean([row["control_passed"] for row in rows[first:]])
    scores["t2i.average"] = mean([scores[f"t2i.{kind}"] for kind in KINDS])
    unseen_scores = [scores[f"t2i.unseen.{kind}"] for kind in UNSEEN_KINDS if f"t2i.unseen.{kind}" in scores]
    if unseen_scores:
        scores["t2i.unseen.average"] = mean(unseen_scores)
    scores |= {"t2i.control": mean(list(control.values())), **control}
    return scores, Section(rows, ("drawn",), drawn[:, None])


def another(group: Sequence[Request], number: int) -> Request | None:
    """The next request of a group, in its circle, that asks for something else."""
    following = (*group[number + 1 :], *group[:number])
    return next((request for request in following if request.prompt != group[number].prompt), None)
