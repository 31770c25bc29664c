"""The curve of a run, how far two of them lie apart, and how far they may: the promise of one run under every layout.

The bounds are those between any two layouts over ten steps in fp32 with AdamW. A loss is compared above an absolute
floor, since it may be near zero where its gradient is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from spar_scale.training.tracking import read_lines

LOSS_RELATIVE, NORM_RELATIVE = 1e-5, 2e-4
"""Bounds of the largest relative difference in loss and in gradient norm."""
LOSS_FLOOR = 1e-6
"""Absolute difference in loss that does not count."""

Curve = Sequence[tuple[float, float]]
"""(loss, gradient norm) of every step."""


def curve(run_dir: Path) -> list[tuple[float, float]]:
    """Read the curve of a run. A value that was not finite is NaN.

    Raises ValueError unless its steps are 1, 2, 3, ..., and UserError for a damaged line.
    """
    lines = read_lines(run_dir / "metrics.jsonl")
    if [line["step"] for line in lines] != list(range(1, len(lines) + 1)):
        raise ValueError(f"{run_dir}: the steps of metrics.jsonl are not 1, 2, 3, ...")
    return [(_number(line["loss"]), _number(line["grad_norm"])) for line in lines]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def distance(found: Curve, expected: Curve, floor: float = LOSS_FLOOR) -> tuple[float, float]:
    """Largest relative difference in loss, beyond `floor`, and in gradient norm; infinite where a value is not finite.

    Raises ValueError for curves of different lengths, or of no step.
    """
    if not len(found) == len(expected) > 0:
        raise ValueError(f"curves of {len(found)} and {len(expected)} steps cannot be compared")
    losses = [_relative(a, b, floor) for (a, _), (b, _) in zip(found, expected, strict=True)]
    norms = [_relative(a, b) for (_, a), (_, b) in zip(found, expected, strict=True)]
    return max(losses), max(norms)


def _relative(found: float, expected: float, floor: float = 0.0) -> float:
    if not math.isfinite(found - expected):
        return math.inf
    difference = max(0.0, abs(found - expected) - floor)
    if difference == 0.0:
        return 0.0
    return difference / abs(expected) if expected else math.inf
