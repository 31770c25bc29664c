"""Text-to-image accuracy: the share of pictures that show exactly what the prompt describes, by kind of prompt.

Prompts with seen and with unseen contents are scored separately. Each picture has its own noise seed. The control
judges the same pictures by the next different prompt of their kind: the score of a model that ignores its prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spar_scale.data.shapes_world import World
from spar_scale.evaluation.detector import detect
from spar_scale.evaluation.judge import fulfils
from spar_scale.evaluation.requests import KINDS, UNSEEN_KINDS, Request, select_requests
from spar_scale.evaluation.sections import Scores, Section, mean
from spar_scale.inference.drawing import generate
from spar_scale.inference.sampler import seeded_noise
from spar_scale.models.spar import SamplingShape
from spar_scale.stages.forward import Forward

BATCH = 64


def draw_and_judge(model: Forward, sampling: SamplingShape, world: World, per_kind: int) -> tuple[Scores, Section]:
    """Generate pictures for `per_kind` prompts of each kind and judge them: scores t2i.*, and a row per picture."""
    groups = {
        (kind, unseen): select_requests(world, kind, unseen, per_kind) for unseen in (False, True) for kind in KINDS
    }
    prompts = [request.prompt for group in groups.values() for request in group]
    pictures = []
    for first in range(0, len(prompts), BATCH):
        part = prompts[first : first + BATCH]
        # A picture's seed is its number, so the batch size does not change it.
        noise = seeded_noise(model.preset.latent_shape, range(first, first + len(part)))
        pictures.append(generate(model, part, noise, sampling))
    drawn = torch.cat(pictures)
    detected, size = detect(drawn, world.shapes), drawn.shape[-1]
    scores, rows, control = {}, [], {}
    for (kind, unseen), group in groups.items():
        if not group:
            continue
        first = len(rows)
        for number, request in enumerate(group):
            objects, other = detected[first + number], next_different_request(group, number)
            rows.append(
                {
                    "prompt": request.prompt,
                    "kind": kind,
                    "unseen": unseen,
                    "passed": fulfils(request, objects, size),
                    "control_passed": other is not None and fulfils(other, objects, size),
                    "found": [o.as_json() for o in objects],
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


def next_different_request(group: Sequence[Request], number: int) -> Request | None:
    """Return the next request of the group (after the last comes the first) with another prompt, or None."""
    following = (*group[number + 1 :], *group[:number])
    return next((request for request in following if request.prompt != group[number].prompt), None)
