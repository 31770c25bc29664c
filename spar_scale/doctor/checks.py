"""What a recipe needs of a machine and its disks, checked without weights: parts, attention, shards, packages."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from parallel.errors import UserError
from spar_scale.config.recipe import Recipe
from spar_scale.data.spec import shards_of, sources_of
from spar_scale.data.storage import read_member, shard_bytes
from spar_scale.data.tar_index import check_fresh, read_index
from spar_scale.doctor.machine import PACKAGES, Finding

if TYPE_CHECKING:
    from spar_scale.stages import Stage

RECIPE = "recipe"
STATE_BYTES = 16
"""Bytes of a trained weight in a checkpoint: fp32 master weight, two moments, EMA."""


def stage_of(recipe: Recipe) -> tuple[Stage | None, list[str]]:
    """Return the training stage without weights, or None and why it cannot be built."""
    from spar_scale.stages import meta_stage

    try:
        return meta_stage(recipe), []
    except UserError as error:
        return None, [str(error)]


def check_recipe(
    recipe: Recipe, world: int, stage: Stage | None, refused: list[str], before: Collection[str] = ()
) -> Iterator[Finding]:
    """Yield a finding for every reason for which `train` would refuse the recipe on any machine.

    What the phases `before` write need not be there yet.
    """
    from spar_scale.training.admission import refusals

    refused = list(dict.fromkeys([*refused, *refusals(recipe, world, stage, before)]))
    yield from (Finding("bad", RECIPE, text) for text in refused)
    if not refused:
        yield Finding("ok", RECIPE, f"{recipe.stage}/{recipe.phase}: layout, run_dir, parent and pretrained parts")


def check_attention(recipe: Recipe) -> Iterator[Finding]:
    """Check that this machine has the recipe's attention backend."""
    from spar_scale.training.attention_choice import attention_of

    try:
        with attention_of(recipe):
            yield Finding("ok", "attention", recipe.attention)
    except UserError as error:
        yield Finding("bad", "attention", str(error))


def check_shards(recipe: Recipe) -> Iterator[Finding]:
    """Check that the first and last shard of every source have a current index and a readable last sample."""
    for source in sources_of(recipe):
        try:
            ((_, shards),) = shards_of([source])
            for shard in dict.fromkeys((shards[0], shards[-1])):
                index = read_index(shard)
                check_fresh(shard, index.tar_bytes, shard_bytes(shard))
                for member in index.members(len(index) - 1).values():
                    read_member(shard, *member)
        except (UserError, OSError) as error:
            yield Finding("bad", "shards", str(error))
        else:
            yield Finding("ok", "shards", f"{source.name}: {len(shards)}, the first and the last can be read")


def checkpoint_bytes(recipe: Recipe, stage: Stage | None) -> int | None:
    """Return the bytes of the newest checkpoint, else an estimate from the trained weights; None without a stage."""
    if checkpoints := sorted((recipe.run_dir / "checkpoints").glob("step-*")):
        return sum(file.stat().st_size for file in checkpoints[-1].iterdir())
    if stage is None:
        return None
    return STATE_BYTES * sum(parameter.numel() for parameter in stage.model.parameters() if parameter.requires_grad)


def check_packages(recipe: Recipe) -> Iterator[Finding]:
    """Check that the packages that a run imports are installed."""
    names = (*PACKAGES, *(("mlflow",) if recipe.tracking.mirror else ()))
    for name in names:
        if importlib.util.find_spec({"pillow": "PIL"}.get(name, name)) is None:
            yield Finding("bad", "package", f"{name} is not installed; make venv, or pip install {name}")
