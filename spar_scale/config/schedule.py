"""The learning rate as a pure function of the step, so that checkpoints need no schedule state."""

from __future__ import annotations

import math

from spar_scale.config.recipe import DiscriminatorConfig, OptimizerConfig


def learning_rate(section: OptimizerConfig | DiscriminatorConfig, step: int, steps: int) -> float:
    """Return the rate of the update that completes step `step` (1-based) of `steps`, before group multipliers.

    Linear warm-up to `lr` over `warmup_steps`, then decay to `min_lr` at the last step. `wsd` (warm-up, stable, decay)
    starts the decay halfway between warm-up and end.
    """
    assert section.lr is not None
    if step <= section.warmup_steps:
        return section.lr * step / section.warmup_steps
    progress = (step - section.warmup_steps) / max(1, steps - section.warmup_steps)
    if section.schedule == "constant":
        return section.lr
    left = 1.0 - progress
    shares = {"linear": left, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)), "wsd": min(1.0, 2.0 * left)}
    share = shares[section.schedule]
    return section.min_lr + (section.lr - section.min_lr) * share
