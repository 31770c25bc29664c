"""What the layers of a stage cost on a micro-batch of its recipe: shapes from the sample's description, no data.

Prompts are as long as `data.plan_tokens` says, else as the longest that is read, and of several tasks the one with the
largest sample is taken: what a stage of a pipeline must be fit for.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from parallel.costs import layer_costs, shapes_after
from spar_scale.config.recipe import Recipe
from spar_scale.data.spec import Source, sources_of
from spar_scale.data.tasks import Conditioned, packed_slots, source_task
from spar_scale.stages import Stage

Sized = dict[str, tuple[tuple[int, ...], type]]  # name -> shape without batch, numpy type


def pipeline_costs(recipe: Recipe, stage: Stage) -> list[float]:
    """Operations of each layer in a training step, by which a pipeline is cut; nothing without one."""
    if recipe.parallel.pipeline == 1:
        return []
    return [float(cost.flops) for cost in layer_costs(stage.layers, micro_batch(recipe, stage), list(stage.terms))]


def micro_batch(recipe: Recipe, stage: Stage) -> dict[str, Tensor]:
    """The stage's input slots of `parallel.micro_batch` samples, on the meta device.

    Where they are stored values, their shapes are those that the layers give which computed them.
    """
    size = recipe.parallel.micro_batch
    slots = max((sample_slots(stage, source, recipe.data.plan_tokens) for source in sources_of(recipe)), key=_size)
    draws: Sized = {name: (draw.shape, np.float32) for name, draw in stage.sample.draws.items()}
    slots |= draws | {"weight": ((), np.float32), "lengths": ((), np.int64)}
    batch = {name: _empty(size, *slot) for name, slot in slots.items()}
    for name in packed_slots(stage.sample):
        batch[name] = batch[name].flatten(0, 1)
    if stage.storing:
        batch = shapes_after(stage.storing, batch)
    return {name: batch[name] for name in stage.inputs}


def sample_slots(stage: Stage, source: Source, text_tokens: int | None = None) -> Sized:
    """Return the slots of one sample of a source, its prompt with so many tokens beside those of its picture.

    With None the prompt is the longest that is read.
    """
    spec, task = stage.sample, source_task(stage.sample.task, source)
    length = task.length(spec)
    if text_tokens is not None and isinstance(task, Conditioned):
        length = min(length, length - spec.num_tokens + text_tokens)
    return {name: ((length,) if shape is None else shape, kind) for name, (shape, kind) in task.slots(spec).items()}


def _size(slots: Sized) -> int:
    return sum(math.prod(shape) for shape, _ in slots.values())


def _empty(batch: int, shape: tuple[int, ...], dtype: type) -> Tensor:
    return torch.empty(batch, *shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, device="meta")
