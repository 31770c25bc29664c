"""Looking at Dynamic Token Routing: which of the language model's layers each token takes.

The weights of a token over the K sampled layers sum to 1. Words are shown in a table, tokens of a picture
and the queries as grids, one for each layer: query (i, j) stands where the latent's (i, j) does. The
routed tokens of a picture to edit give way to its features, so their weights have no effect.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from spar_scale.data.text import IMAGE
from spar_scale.stages.forward import Forward

_LINE, _CELL, _WORD, _MARGIN, _SIDE = 18, 64, 130, 12, 112  # pixels
_LIGHT, _DARK = (247, 247, 252), (20, 50, 120)


@dataclass(frozen=True)
class Routes:
    """Routing weights (N, K) of one sequence: `words` names its first tokens, the queries follow."""

    layers: tuple[int, ...]
    words: tuple[str, ...]
    weights: Tensor

    @property
    def is_picture(self) -> Tensor:
        """Which tokens (N,) are those of the picture to edit."""
        names = [word == IMAGE for word in self.words]
        return torch.tensor(names + [False] * (len(self.weights) - len(names)))

    @property
    def is_query(self) -> Tensor:
        """Which tokens (N,) are queries."""
        return torch.arange(len(self.weights)) >= len(self.words)

    def groups(self) -> Iterator[tuple[str, Tensor]]:
        """The tokens that stand on a grid: what they are, and their weights (n, K)."""
        if self.is_picture.any():
            yield "picture, not used", self.weights[self.is_picture]
        yield "queries", self.weights[self.is_query]

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """The words but for the picture's, and their weights (K,)."""
        for word, weights in zip(self.words, self.weights, strict=False):
            if word != IMAGE:
                yield word, weights


@torch.no_grad()
def route(model: Forward, prompt: Sequence[int], picture: Tensor | None = None) -> Routes:
    """Return the routes of one prompt, given as tokens, with the picture (1, 3, S, S) that it is about."""
    weights = model.routing_weights([prompt], picture)
    return Routes(model.sampled_layers, tuple(model.text.name(token) for token in prompt), weights)


def routes_table(routes: Routes) -> str:
    """The weights of the words, the means of the grids and of all tokens that are used, as text."""
    lines = [f"{'token':30}" + "".join(f"{f'layer {layer}':>10}" for layer in routes.layers)]
    means = [(f"{name} ({len(weights)}, mean)", weights.mean(0)) for name, weights in routes.groups()]
    everything = ("mean of all used", routes.weights[~routes.is_picture].mean(0))
    for name, weights in (*routes.named(), *means, everything):
        lines.append(f"{name:30}" + "".join(f"{weight:10.3f}" for weight in weights.tolist()))
    return "\n".join(lines)


def routes_picture(routes: Routes) -> Image.Image:
    """Draw the table of the words, and below it the grids, one column for each layer."""
    words, groups, columns = list(routes.named()), list(routes.groups()), len(routes.layers)
    step = max(_CELL, _SIDE + _MARGIN)
    width = _MARGIN + _WORD + columns * step + _MARGIN
    height = 2 * _MARGIN + (3 + len(words)) * _LINE + len(groups) * (_SIDE + _MARGIN + _LINE) + 2 * _LINE
    canvas = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    left, top = [_MARGIN + _WORD + k * step for k in range(columns)], _MARGIN
    draw.text((_MARGIN, top), "routing weights", "black", font)
    for x, layer in zip(left, routes.layers, strict=True):
        draw.text((x, top), f"layer {layer}", "black", font)
    for name, weights in (*words, ("mean of all used", routes.weights[~routes.is_picture].mean(0))):
        top += _LINE
        draw.text((_MARGIN, top), name, "black", font)
        for x, weight in zip(left, weights.tolist(), strict=True):
            draw.rectangle((x, top, x + _SIDE - 1, top + _LINE - 2), fill=_color(weight))
            draw.text((x + 6, top), f"{weight:.3f}", "white" if weight > 0.5 else "black", font)
    top += 2 * _LINE
    for name, weights in groups:
        side = round(len(weights) ** 0.5)
        draw.text((_MARGIN, top), name, "black", font)
        draw.text((_MARGIN, top + _LINE), f"{side} x {side} tokens", "black", font)
        for x, column in zip(left, weights.T, strict=True):
            canvas.paste(_heat(column.unflatten(0, (side, side))), (x, top))
            draw.text((x, top + _SIDE), f"mean {column.mean():.3f}", "black", font)
        top += _SIDE + _MARGIN + _LINE
    _legend(draw, font, left[0], top)
    return canvas


def _heat(grid: Tensor) -> Image.Image:
    """A grid (g, g) of weights, one square of colour each."""
    colors = [_color(weight) for weight in grid.flatten().tolist()]
    picture = Image.new("RGB", (grid.shape[1], grid.shape[0]))
    picture.putdata(colors)
    return picture.resize((_SIDE, _SIDE), Image.Resampling.NEAREST)


def _legend(draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, left: int, top: int) -> None:
    draw.text((_MARGIN, top), "weight 0 to 1", "black", font)
    for x in range(_SIDE):
        draw.line((left + x, top, left + x, top + _LINE - 4), fill=_color(x / (_SIDE - 1)))


def _color(weight: float) -> tuple[int, int, int]:
    """From light (0) to dark (1)."""
    red, green, blue = (round(a + (b - a) * weight) for a, b in zip(_LIGHT, _DARK, strict=True))
    return red, green, blue
