"""Routing maps: which of the language model's layers each token takes, and a sentence on whether it matters.

The weights of a token over the sampled layers sum to 1; every number and sentence here is computed from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spar_scale.evaluation.report.sources import Found

SHOWN = 4  # prompts
DULL, ALIKE = 0.9, 0.1  # one layer takes this share of all; no token's share is this far from the mean


@dataclass(frozen=True)
class Map:
    """A prompt's map: a row for each token, a weight for each layer."""

    prompt: str
    layers: list[int]
    rows: list[tuple[str, list[float]]]


@dataclass(frozen=True)
class Routes:
    """The maps and what can be said of all of them, or the reason why there are none."""

    maps: list[Map]
    sentence: str = ""
    absent: str = ""


def routes(found: Found) -> Routes:
    """Return the first maps, and a sentence over the tokens of all."""
    rows = found.details.get("routes", {}).get("rows", [])
    whole = [_map(row) for row in rows]
    whole = [item for item in whole if item.rows]
    if not whole:
        return Routes([], absent="Not here: evaluation/details.json has no section “routes”.")
    return Routes(whole[:SHOWN], sentence(whole))


def sentence(maps: list[Map]) -> str:
    """Say how the weight divides over the layers, and whether tokens differ in it."""
    layers = maps[0].layers
    tokens = [(word, weights) for item in maps if item.layers == layers for word, weights in item.rows]
    shares = [sum(weights[k] for _, weights in tokens) / len(tokens) for k in range(len(layers))]
    said = ", ".join(f"layer {layer} takes {share:.0%}" for layer, share in zip(layers, shares, strict=True))
    said = f"Over the {len(tokens)} tokens of {len(maps)} {'prompt' if len(maps) == 1 else 'prompts'}, {said}."
    away, word, k = max((abs(weights[k] - shares[k]), word, k) for word, weights in tokens for k in range(len(layers)))
    if max(shares) > DULL:
        return f"{said} The maps are dull: nearly every token takes layer {layers[shares.index(max(shares))]}."
    if away < ALIKE:
        return f"{said} The maps are dull: no token is more than {away:.0%} from the mean; a fixed mixture would do."
    favourites = {layers[weights.index(max(weights))] for _, weights in tokens}
    return (
        f"{said} Tokens differ: “{word}” is farthest from the mean, by {away:.0%} at layer {layers[k]}; "
        f"the layer that a token takes most is one of {', '.join(map(str, sorted(favourites)))}."
        if len(favourites) > 1
        else f"{said} All tokens take layer {favourites.pop()} most, and differ in how much: “{word}” is farthest from "
        f"the mean, by {away:.0%} at layer {layers[k]}."
    )


def _map(row: dict[str, Any]) -> Map:
    layers = list(row.get("layers", []))
    named = zip(map(str, row.get("tokens", [])), row.get("weights", []), strict=False)
    return Map(str(row.get("prompt", "")), layers, [(word, w) for word, w in named if len(w) == len(layers)])
