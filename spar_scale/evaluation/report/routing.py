"""Routing maps of the report: each token's weights over the language model's layers, and a sentence that sums them up.

The weights of a token over the sampled layers sum to 1. Every number and sentence here is computed from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spar_scale.evaluation.report.sources import ReportData

SHOWN = 4  # prompts
ONE_LAYER = 0.9  # above this mean weight of one layer, the routing chooses that layer for nearly every token
ALIKE = 0.1  # if no weight of a token is farther from the mean than this, tokens do not differ


@dataclass(frozen=True)
class Map:
    """The routing map of a prompt: one row per token, one weight per layer."""

    prompt: str
    layers: list[int]
    rows: list[tuple[str, list[float]]]


@dataclass(frozen=True)
class Routes:
    """The maps and a sentence that sums them up, or in `absent` the reason why there are none."""

    maps: list[Map]
    summary: str = ""
    absent: str = ""


def routes(data: ReportData) -> Routes:
    """Return the first maps, and a sentence about the tokens of all maps."""
    rows = data.details.get("routes", {}).get("rows", [])
    maps = [item for item in map(_map, rows) if item.rows]
    if not maps:
        return Routes([], absent="Not available: evaluation/details.json has no section “routes”.")
    return Routes(maps[:SHOWN], summary(maps))


def summary(maps: list[Map]) -> str:
    """Describe how the weight is divided among the layers, and whether tokens differ."""
    layers = maps[0].layers
    tokens = [(word, weights) for item in maps if item.layers == layers for word, weights in item.rows]
    shares = [sum(weights[k] for _, weights in tokens) / len(tokens) for k in range(len(layers))]
    mixture = ", ".join(f"layer {layer} has {share:.0%}" for layer, share in zip(layers, shares, strict=True))
    prompts = f"{len(maps)} {'prompt' if len(maps) == 1 else 'prompts'}"
    text = f"Mean weights over the {len(tokens)} tokens of {prompts}: {mixture}."
    distance, word, k = max(
        (abs(weights[k] - shares[k]), word, k) for word, weights in tokens for k in range(len(layers))
    )
    if max(shares) > ONE_LAYER:
        return f"{text} Nearly every token uses layer {layers[shares.index(max(shares))]} alone."
    if distance < ALIKE:
        return f"{text} No token is more than {distance:.0%} from the mean: a fixed mixture would be as good."
    farthest = f"“{word}” is farthest from the mean, by {distance:.0%} at layer {layers[k]}"
    strongest = {layers[weights.index(max(weights))] for _, weights in tokens}
    if len(strongest) > 1:
        layer_list = ", ".join(map(str, sorted(strongest)))
        return f"{text} Tokens differ: {farthest}; the strongest layer of a token is one of {layer_list}."
    return f"{text} Layer {strongest.pop()} is the strongest for all tokens, but by different amounts: {farthest}."


def _map(row: dict[str, Any]) -> Map:
    layers = list(row.get("layers", []))
    tokens = zip(map(str, row.get("tokens", [])), row.get("weights", []), strict=False)
    return Map(str(row.get("prompt", "")), layers, [(word, w) for word, w in tokens if len(w) == len(layers)])
