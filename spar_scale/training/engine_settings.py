"""Derive the engine's settings from a recipe."""

from __future__ import annotations

from parallel.zero.config import EngineSettings
from spar_scale.config.recipe import Recipe
from spar_scale.data.order import micro_steps


def engine_settings(recipe: Recipe, data_size: int) -> EngineSettings:
    """Return the engine's settings for a data-parallel size."""
    micro_batch = recipe.parallel.micro_batch
    return EngineSettings(
        precision=recipe.precision,
        micro_batch=micro_batch,
        micro_steps=micro_steps(recipe.global_batch, recipe.data.task_block, micro_batch, data_size),
        global_batch=recipe.global_batch,
        clip=recipe.optimizer.clip,
        ema_decay=recipe.optimizer.ema_decay,
        recompute=recipe.parallel.recompute == "blocks",
    )
