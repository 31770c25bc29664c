"""The losses of a trained run on samples that it has not seen, one value per sample.

The run's averaged weights, its own list of layers, draws of noise and time that depend on the sample
alone: two runs of one phase are compared on the very same terms. No caption is dropped. With `shuffled`
each sample gets the prompt of its neighbour, the control for whether a diffusion model listens; with `mirrored`
the picture to edit is mirrored and the target is not, the control for whether it sees where things stand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from parallel import checkpoint
from parallel.errors import UserError
from parallel.program import Program
from spar_scale.data.loader import Loader, Source
from spar_scale.stages import Stage
from spar_scale.training.export import recipe_of
from spar_scale.training.parent import overwrite, started_stage

PROMPT_SLOTS = ("tokens", "keep")


def held_out_terms(
    run_dir: Path, shards: Mapping[str, str], samples: int, shuffled: bool = False, mirrored: bool = False
) -> dict[str, Tensor]:
    """Return each term of the run's phase over `samples` held-out samples, term -> (samples,) fp32.

    `shards` maps the phase's source names to held-out shards; they are mixed in equal shares. No sample
    counts twice: where they hold fewer, or bad ones, the result is shorter. Raises UserError for a run
    without a checkpoint and shards that cannot be read.
    """
    recipe = recipe_of(run_dir)
    found = checkpoint.find(run_dir / "checkpoints")
    if found is None:
        raise UserError(f"{run_dir}: holds no checkpoint yet; train it further")
    stage = started_stage(recipe)
    overwrite(stage.model, checkpoint.read(found, "ema"), found)
    return stage_terms(stage, shards, samples, shuffled, mirrored)


@torch.no_grad()
def stage_terms(
    stage: Stage,
    shards: Mapping[str, str],
    samples: int,
    shuffled: bool = False,
    mirrored: bool = False,
    seed: int = 0,
    batch: int = 50,
) -> dict[str, Tensor]:
    """The same for a stage with the weights that it has now; `seed` keys the draws, `batch` samples run at a time."""
    stage.model.eval()
    if shuffled and not set(PROMPT_SLOTS) <= set(stage.inputs):
        raise UserError(f"this phase reads {', '.join(stage.inputs)}: there are no prompts to shuffle")
    program = Program(stage.layers, stage.inputs, list(stage.terms)).eval()
    loader = Loader(
        [Source(name, where) for name, where in shards.items()], replace(stage.sample, caption_dropout=0.0), seed=seed,
        global_batch=batch, task_block=batch, micro_batch=batch, dp_rank=0, dp_size=1, workers=0, first_step=0,
        steps=-(-samples // batch),
    )  # fmt: skip
    distinct = next((number for number in range(samples) if loader.order.epoch(number) > 0), samples)
    values = []
    for batch_slots in loader:
        good = batch_slots["weight"] > 0
        slots = {name: batch_slots[name][good] for name in stage.inputs}
        if shuffled:
            slots |= {name: slots[name].roll(1, 0) for name in PROMPT_SLOTS}
        if mirrored:
            slots["images"] = torch.cat([slots["images"][:, :1], slots["images"][:, 1:].flip(-1)], dim=1)
        values.append(program(slots)[batch_slots["sample"][good] < distinct])
    stacked = torch.cat(values)
    return {name: stacked[:, index] for index, name in enumerate(stage.terms)}


def difference(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Return the mean of one - other over paired samples (n,) and its standard error."""
    paired = (one - other).double()
    return float(paired.mean()), float(paired.std() / len(paired) ** 0.5)
