"""Curves as inline SVG: a thin line of raw values, a thick line of their moving mean, axes with a few numbers.

Colours are CSS variables of the page, so curves follow dark mode. The raw line has at most MAX_POINTS points; if there
are more steps, neighbouring steps are combined into their lowest and highest value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

from markupsafe import Markup

from spar_scale.evaluation.report.tables import MINUS

WIDTH, HEIGHT = 320, 170  # units of the drawing
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 8, 24  # margins
MAX_POINTS = 600
LOG_RATIO = 8.0  # a logarithmic axis where the highest value is this many times the lowest
LARGEST, SMALLEST = 1e100, 1e-100  # larger magnitudes are clipped to LARGEST, smaller ones drawn as 0
SMOOTH_PARTS = 40  # the moving mean runs over a fortieth of the steps


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the centred moving mean; at both ends the window is truncated, not shifted."""
    half = len(values) // (2 * SMOOTH_PARTS)
    # Exact fractions: in a float sum, a spike of 1e18 would round all later values away.
    sums = list(accumulate(map(Fraction, values), initial=Fraction()))
    spans = ((max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values)))
    return [float((sums[last] - sums[first]) / (last - first)) for first, last in spans]


def draw(steps: Sequence[int], values: Sequence[float], label: str) -> Markup:
    """Return an <svg> of finite values over steps; `label` is its text for screen readers."""
    values = [_clipped(value) for value in values]
    low, high = min(values), max(values)
    logarithmic = low > 0 and high / low >= LOG_RATIO
    scale = math.log10 if logarithmic else float
    bottom, top = scale(low), scale(high)
    margin = 0.04 * (top - bottom) or 0.5 * abs(top) or 0.5
    bottom, top = bottom - margin, top + margin
    first, last = steps[0], max(steps[-1], steps[0] + 1)

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (scale(value) - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    parts = [
        Markup('<svg class="curve" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
            WIDTH, HEIGHT, f"{label}{', logarithmic' if logarithmic else ''}"
        )
    ]
    inverse = (lambda height: 10**height) if logarithmic else float
    for tick in _ticks(inverse(bottom), inverse(top), logarithmic):
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{h}" y2="{h}"/><text x="{}" y="{}" class="y">{}</text>'
            ).format(
                LEFT,
                WIDTH - RIGHT,
                LEFT - 5,
                f"{y(tick) + 3.5:.1f}",
                f"{tick:g}".replace("-", MINUS),
                h=f"{y(tick):.1f}",
            )
        )
    ends = ((first, "start"), (last, "end")) if len(steps) > 1 else ((first, "start"),)
    for step, anchor in ends:
        parts.append(
            Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(
                f"{x(step):.1f}", HEIGHT - 7, anchor, f"step {step:,}" if anchor == "start" else f"{step:,}"
            )
        )
    raw, mean = _thinned(steps, values), list(zip(steps, smoothed(values), strict=True))
    stride = max(1, len(mean) // (MAX_POINTS // 2))
    for name, points in (("raw", raw), ("mean", [*mean[::stride], mean[-1]])):
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        parts.append(Markup('<polyline class="{}" points="{}"/>').format(name, path))
    return Markup("").join([*parts, Markup("</svg>")])


def _clipped(value: float) -> float:
    """Clip a value so that the arithmetic of the axes cannot overflow."""
    return min(max(value, -LARGEST), LARGEST) if abs(value) > SMALLEST else 0.0


def _thinned(steps: Sequence[int], values: Sequence[float]) -> list[tuple[int, float]]:
    width = -(-2 * len(values) // MAX_POINTS) if len(values) > MAX_POINTS else 1
    points: list[tuple[int, float]] = []
    for first in range(0, len(values), width):
        column = values[first : first + width]
        points += [(steps[first], extreme) for extreme in dict.fromkeys((min(column), max(column)))]
    return points


def _ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    """Return round numbers in [low, high], at least three if possible.

    A logarithmic axis has powers of ten, then also 3 or 2 and 5 times these; a linear one has equal steps.
    """
    if logarithmic:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for factors in ((1,), (1, 3), (1, 2, 5)):
            ticks = [factor * 10.0**decade for decade in decades for factor in factors]
            ticks = [tick for tick in ticks if low <= tick <= high]
            if len(ticks) >= 3:
                break
        return ticks
    unit = 10.0 ** math.floor(math.log10(high - low))
    for step in (5 * unit, 2 * unit, unit, unit / 2, unit / 5):
        count = range(math.ceil(low / step), math.floor(high / step) + 1)
        if len(count) >= 3:
            break
    return [round(index * step, 12) for index in count]
