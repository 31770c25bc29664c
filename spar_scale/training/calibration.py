"""Measure the scale of a run's latents on its own pictures, on all ranks together.

Flow matching mixes latents with noise of deviation 1, so it works on latents times this scale, the inverse of their
deviation. Every rank holds the whole model and encodes every world-size-th batch on its device. The batches do not
depend on the number of ranks, so neither does the scale. After each batch all ranks exchange its latents: no rank waits
longer than a batch takes, and the watchdog sees that the run advances. A run that ends here resumes at the measurement.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from parallel.errors import UserError
from parallel.launch.agreement import run_on_all_ranks
from parallel.topology import Topology
from spar_scale.config.recipe import Recipe
from spar_scale.data.loader import Batch, Loader
from spar_scale.data.spec import sources_of
from spar_scale.ops.attention import use_backend
from spar_scale.stages import LatentScale
from spar_scale.stages.forward import Forward

PICTURES = 256
"""Number of pictures on which the scale is measured."""
BATCH_PIXELS, LARGEST_BATCH = 2**18, 64
"""Limits of a batch. One picture of 448 pixels takes a CPU 14 s (vision tower of spar_1b), so it is alone."""


def measured_scale(
    recipe: Recipe, forward: Forward, topology: Topology, device: torch.device, report: Callable[[str], None]
) -> LatentScale:
    """Return the scale over the good ones of the first PICTURES samples of the run; all ranks call it together.

    `forward` has the weights in fp32, the same on every rank. `report` gets the progress. Raises UserError if all
    samples are bad.
    """
    batches, group = iter(_loader(recipe, forward, topology)), topology.agreement_group
    forward.stage.model.to(device)
    latents: list[Tensor] = []
    errors: list[str] = []
    # Backends for bf16 alone, which a recipe may name, do not compute in fp32.
    with use_backend("auto", device.type, torch.float32):
        for number in itertools.count():
            report(f"pictures {number * topology.world * _batch_size(forward)} and following of {PICTURES}")
            found = run_on_all_ranks(group, lambda: _encoded(next(batches, None), forward, device))
            if found is None:  # on every rank: all have the same number of batches
                break
            for encoded, bad in topology.gather(found):
                latents += encoded
                errors += bad
    if not latents:
        raise UserError(
            f"export: none of the first {PICTURES} images of data.sources could be used ({errors[0]}), but the scale "
            "of the latents is measured on them. Restore the shards that the run was trained on, and run the same "
            "command again",
            everywhere=True,
        )
    measured = torch.cat(latents)
    return LatentScale(latent_scale(measured), len(measured))


def latent_scale(latents: Tensor) -> float:
    """Return 1 / deviation of latents (n, Z, g, g), over all their elements together."""
    return 1 / float(latents.float().std())


def _batch_size(forward: Forward) -> int:
    return max(1, min(LARGEST_BATCH, BATCH_PIXELS // forward.stage.sample.image_size**2))


def _loader(recipe: Recipe, forward: Forward, topology: Topology) -> Loader:
    return Loader(
        sources_of(recipe),
        forward.stage.sample,
        seed=recipe.seed,
        global_batch=PICTURES,
        task_block=PICTURES,
        micro_batch=_batch_size(forward),
        dp_rank=topology.rank,
        dp_size=topology.world,
        workers=0,
        first_step=0,
        steps=1,
    )


def _encoded(batch: Batch | None, forward: Forward, device: torch.device) -> tuple[list[Tensor], list[str]] | None:
    """Return the latents of the good pictures of a batch, on the CPU, and what is wrong with the bad ones."""
    if batch is None:
        return None
    good = batch["images"][batch["weight"] > 0]
    encoded = [forward.encode(good.to(device)).float().cpu()] if len(good) else []
    return encoded, [f"{error['shard']}: {error['key']}: {error['reason']}" for error in batch["errors"]]
