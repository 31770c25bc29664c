"""The losses of a trained run on held-out samples, one value per sample.

The run's EMA weights are evaluated with the phase's own list of layers. Noise and times depend on the sample alone, so
two runs of a phase are compared on identical draws. No caption is dropped. Two controls: with `shuffled`, each sample
gets the prompt of its neighbour, which shows whether a diffusion model uses its prompt; with `mirrored`, the source
picture of an edit is mirrored and the target is not, which shows whether the model uses positions.
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
from spar_scale.data.tasks import packed_slots
from spar_scale.stages import Stage
from spar_scale.training.export import recipe_of
from spar_scale.training.parent import overwrite, started_stage

PROMPT_SLOTS = ("tokens", "lengths")


def held_out_terms(
    run_dir: Path, shards: Mapping[str, str], samples: int, shuffled: bool = False, mirrored: bool = False
) -> dict[str, Tensor]:
    """Return each term of the run's phase over `samples` held-out samples, term -> (samples,) fp32.

    `shards` maps the phase's source names to held-out shards; they are mixed in equal shares. No sample counts twice:
    if the shards hold fewer samples, or bad ones, the result is shorter. Raises UserError if the run has no checkpoint
    or shards cannot be read.
    """
    recipe = recipe_of(run_dir)
    latest = checkpoint.find(run_dir / "checkpoints")
    if latest is None:
        raise UserError(f"{run_dir}: holds no checkpoint yet; train it further")
    stage = started_stage(recipe.model_copy(update={"precision": "fp32"}))  # that of the EMA
    overwrite(stage.model, checkpoint.read(latest, "ema"), latest)
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
    """Do the same for a training stage with its current weights.

    `seed` keys the noise and time draws; `batch` samples are computed at a time.
    """
    stage.model.eval()
    if shuffled and not set(PROMPT_SLOTS) <= set(stage.inputs):
        raise UserError(f"this phase reads {', '.join(stage.inputs)}: there are no prompts to shuffle")
    program = Program(stage.layers, stage.inputs, list(stage.terms)).eval()
    loader = Loader(
        [Source(name, where) for name, where in shards.items()], replace(stage.sample, caption_dropout=0.0), seed=seed,
        global_batch=batch, task_block=batch, micro_batch=batch, dp_rank=0, dp_size=1, workers=0, first_step=0,
        steps=-(-samples // batch),
    )  # fmt: skip
    # From the second epoch on, samples repeat: they are not counted.
    distinct = next((number for number in range(samples) if loader.order.epoch(number) > 0), samples)
    values = []
    for batch_slots in loader:
        good = batch_slots["weight"] > 0
        slots = _select(stage, batch_slots, good)
        if shuffled:
            last = int(slots["lengths"][-1])  # the neighbour's prompt: those of all samples, moved by the last one
            slots |= {"tokens": slots["tokens"].roll(last), "lengths": slots["lengths"].roll(1)}
        if mirrored:
            slots["images"] = torch.cat([slots["images"][:, :1], slots["images"][:, 1:].flip(-1)], dim=1)
        values.append(program(slots)[batch_slots["sample"][good] < distinct])
    stacked = torch.cat(values)
    return {name: stacked[:, index] for index, name in enumerate(stage.terms)}


def _select(stage: Stage, batch: Mapping[str, Tensor], good: Tensor) -> dict[str, Tensor]:
    """Return the input slots of the good samples of a batch."""
    packed = packed_slots(stage.sample)
    good_tokens = torch.repeat_interleave(good, batch["lengths"]) if packed else good
    return {name: batch[name][good_tokens if name in packed else good] for name in stage.inputs}


def difference(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Return the mean of first - second over paired samples (n,) and its standard error."""
    paired = (first - second).double()
    return float(paired.mean()), float(paired.std() / len(paired) ** 0.5)
