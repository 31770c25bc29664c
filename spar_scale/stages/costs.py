"""What the layers of a stage cost on a micro-batch of its recipe: shapes from the sample's description, no data.

Texts are as long as the longest that is read, and of several tasks the one with the largest sample is taken: what a
stage of a pipeline must be fit for.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from parallel.costs import layer_costs, shapes_after
from spar_scale.config.recipe import Recipe
from spar_scale.data.spec import sources_of
from spar_scale.data.tasks import Slots, source_task
from spar_scale.stages import Stage


def pipeline_costs(recipe: Recipe, stage: Stage) -> list[float]:
    """Operations of each layer in a training step, by which a pipeline is cut; nothing without one."""
    if recipe.parallel.pipeline == 1:
        return []
    return [float(cost.flops) for cost in layer_costs(stage.layers, micro_batch(recipe, stage), list(stage.terms))]


def micro_batch(recipe: Recipe, stage: Stage) -> dict[str, Tensor]:
    """The stage's input slots of `parallel.micro_batch` samples, on the meta device.

    Where they are stored values, their shapes are those that the layers give which computed them.
    """
    tasks = [source_task(stage.sample.task, source).slots(stage.sample) for source in sources_of(recipe)]
    draws: Slots = {name: (draw.shape, np.float32) for name, draw in stage.sample.draws.items()}
    slots: Slots = {**max(tasks, key=_size), **draws, "weight": ((), np.float32)}
    batch = {name: _empty(recipe.parallel.micro_batch, *slot) for name, slot in slots.items()}
    if stage.storing:
        batch = shapes_after(stage.storing, batch)
    return {name: batch[name] for name in stage.inputs}


def _size(slots: Slots) -> int:
    return sum(math.prod(shape) for shape, _ in slots.values())


def _empty(batch: int, shape: tuple[int, ...], dtype: type) -> Tensor:
    return torch.empty(batch, *shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, device="meta")
