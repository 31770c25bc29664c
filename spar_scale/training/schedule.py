"""The learning rate as a pure function of the step, so that checkpoints need no schedule state."""

from __future__ import annotations

import math

from spar_scale.config.recipe import OptimizerConfig


def learning_rate(optimizer: OptimizerConfig, step: int, steps: int) -> float:
    """Return the rate of the update that completes step `step` (1-based) of `steps`, before group multipliers.

    Linear warm-up to `lr` over `warmup_steps`, then decay to `min_lr` at the last step. `wsd` (warm-up, stable, decay)
    starts the decay halfway between warm-up and end.
    """
    if step <= optimizer.warmup_steps:
        return optimizer.lr * step / optimizer.warmup_steps
    progress = (step - optimizer.warmup_steps) / max(1, steps - optimizer.warmup_steps)
    if optimizer.schedule == "constant":
        return optimizer.lr
    left = 1.0 - progress
    shares = {"linear": left, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)), "wsd": min(1.0, 2.0 * left)}
    share = shares[optimizer.schedule]
    return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * share
