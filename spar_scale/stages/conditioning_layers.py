"""From a prompt to captions of the diffusion transformer, as layers: language model, routing, connector.

Slots (B samples, M pictures of a sample: the target first, P prompt tokens, Q queries, D width, K states):
    images (B, M, 3, S, S)   tokens (B, P) int64    keep (B, P) uint8, 1 where a token is real
    features (B * M, N, D), then the target's (B, N, D)
    prefix (B, P, D)         queries (B, Q, D)
    prefix_state_k (B, P, D), query_state_k (B, Q, D): hidden state k; 0 is the embedding, the last after the norm
    captions (B, P + Q, D), at the end (B, P + Q, C)
All but the queries and what follows from them is without gradient. So the prefix's states depend on the
sample alone: `prefix_layers` is the way to them by itself, `query_layers` the rest of the way from
stored ones, bit-equal to `conditioning_layers`, which does both at once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from parallel.program import Layer
from spar_scale.models.conditioning import (
    Rotary,
    conditioned_layer,
    extend_padding_mask,
    final_state,
    prefix_layer,
    query_layer,
)
from spar_scale.models.connector import Connector, connector_layer
from spar_scale.models.mllm import merge
from spar_scale.models.unified import SPAR, keep_references


class EmbedPrompt(Layer):
    """`tokens` to `prefix_state_0` and `prefix`, and the `queries`."""

    reads: tuple[str, ...] = ("tokens",)
    writes: tuple[str, ...] = ("prefix_state_0", "prefix", "queries")
    detached = frozenset({"prefix_state_0", "prefix"})

    def __init__(self, embedding: nn.Module, queries: nn.Module):
        super().__init__()
        self.embedding, self.queries = embedding, queries

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """Embed the words."""
        embedded = self.embedding(tokens)
        return {"prefix_state_0": embedded, "prefix": embedded, "queries": self.queries(len(tokens))}


class EmbedIllustratedPrompt(EmbedPrompt):
    """The same with the features of the picture to edit in their places; of `features` the target's remain."""

    reads = ("tokens", "features")
    writes = ("prefix_state_0", "prefix", "queries", "features")
    detached = frozenset({"prefix_state_0", "prefix", "features"})

    def __init__(self, embedding: nn.Module, queries: nn.Module, image_token_id: int):
        super().__init__(embedding, queries)
        self.image_token_id = image_token_id

    def forward(self, tokens: Tensor, features: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Embed the words and merge the features of all pictures but the first."""
        pictures = features.unflatten(0, (len(tokens), -1))
        embedded = self.embedding(tokens)
        if pictures.shape[1] > 1:
            embedded = merge(embedded, pictures[:, 1:].flatten(1, 2), tokens == self.image_token_id)
        queries = self.queries(len(tokens))
        return {"prefix_state_0": embedded, "prefix": embedded, "queries": queries, "features": pictures[:, 0]}


class ConditionedLayer(Layer):
    """Layer number `index` (from 1) of the frozen language model; a sampled one also writes its states."""

    reads = ("prefix", "queries", "keep")

    def __init__(self, layer: nn.Module, rotary: Rotary, index: int, sampled: bool, norm: nn.Module | None):
        super().__init__()
        self.layer, self.rotary, self.index, self.norm = layer, rotary, index, norm
        self.states = (f"prefix_state_{index}", f"query_state_{index}") if sampled else ()
        self.writes = ("prefix", "queries", *self.states)
        self.detached = frozenset({"prefix", *self.states[:1]})

    def forward(self, prefix: Tensor, queries: Tensor, keep: Tensor) -> dict[str, Tensor]:
        """Pass the layer; the last one's states are those after the final norm."""
        both = conditioned_layer(self.layer, self.rotary, prefix, queries, keep)
        states = both if self.norm is None else final_state(self.norm, *both)
        return {"prefix": both[0], "queries": both[1], **dict(zip(self.states, states, strict=False))}


class PrefixLayer(Layer):
    """The prefix's half of layer number `index` (from 1): `prefix`, and `prefix_state_k` of whatever k it is."""

    reads = ("prefix", "keep")

    def __init__(self, layer: nn.Module, rotary: Rotary, index: int, norm: nn.Module | None):
        super().__init__()
        self.layer, self.rotary, self.norm = layer, rotary, norm
        self.writes = ("prefix", f"prefix_state_{index}")
        self.detached = frozenset(self.writes)

    def forward(self, prefix: Tensor, keep: Tensor) -> dict[str, Tensor]:
        """Pass the layer; the last one's state is that after the final norm."""
        prefix = prefix_layer(self.layer, self.rotary, prefix, keep)
        return dict(zip(self.writes, (prefix, prefix if self.norm is None else self.norm(prefix)), strict=True))


class BeginQueries(Layer):
    """The `queries`, one set for each of `tokens`."""

    reads = ("tokens",)
    writes = ("queries",)

    def __init__(self, queries: nn.Module):
        super().__init__()
        self.queries = queries

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """Repeat them."""
        return {"queries": self.queries(len(tokens))}


class QueryLayer(Layer):
    """The queries' half of layer number `index`, on the prefix state that enters it."""

    def __init__(self, layer: nn.Module, rotary: Rotary, index: int, sampled: bool, norm: nn.Module | None):
        super().__init__()
        self.layer, self.rotary, self.norm = layer, rotary, norm
        self.prefix = f"prefix_state_{index - 1}"
        self.reads = (self.prefix, "queries", "keep")
        self.writes = ("queries", f"query_state_{index}") if sampled else ("queries",)

    def forward(self, queries: Tensor, keep: Tensor, **states: Tensor) -> dict[str, Tensor]:
        """Pass the layer; the last one's state is that after the final norm."""
        queries = query_layer(self.layer, self.rotary, states[self.prefix], queries, keep)
        state = queries if self.norm is None else self.norm(queries)
        return dict(zip(self.writes, (queries, state), strict=False))


class RouteTokens(Layer):
    """The sampled states, routed token by token, to `captions`; the picture to edit stays as it was embedded."""

    writes = ("captions",)

    def __init__(self, routing: nn.Module, sampled: tuple[int, ...], image_token_id: int):
        super().__init__()
        self.routing, self.sampled, self.image_token_id = routing, sampled, image_token_id
        states = (f"{part}_state_{index}" for index in sampled for part in ("prefix", "query"))
        self.reads = (*states, "prefix_state_0", "tokens")

    def forward(self, tokens: Tensor, **states: Tensor) -> dict[str, Tensor]:
        """Stack, route, put the picture back."""
        stacked = [torch.cat([states[f"prefix_state_{k}"], states[f"query_state_{k}"]], dim=1) for k in self.sampled]
        routed = self.routing(torch.stack(stacked, dim=1))
        return {"captions": keep_references(routed, states["prefix_state_0"], tokens == self.image_token_id)}


class ConnectorLayer(Layer):
    """One bidirectional layer of the connector on `captions`."""

    reads = ("captions", "keep")
    writes = ("captions",)

    def __init__(self, layer: nn.Module, rotary: Rotary, num_queries: int):
        super().__init__()
        self.layer, self.rotary, self.num_queries = layer, rotary, num_queries

    def forward(self, captions: Tensor, keep: Tensor) -> dict[str, Tensor]:
        """Run the layer."""
        return {
            "captions": connector_layer(self.layer, self.rotary, captions, extend_padding_mask(keep, self.num_queries))
        }


class ProjectCaptions(Layer):
    """`captions` through a norm to the caption channels."""

    reads = ("captions",)
    writes = ("captions",)

    def __init__(self, norm: nn.Module, projection: nn.Module):
        super().__init__()
        self.norm, self.projection = norm, projection

    def forward(self, captions: Tensor) -> dict[str, Tensor]:
        """Project."""
        return {"captions": self.projection(self.norm(captions))}


def conditioning_layers(model: SPAR, illustrated: bool) -> list[Layer]:
    """Return the way from `tokens` (and `features`, where prompts are `illustrated`) to `captions`."""
    rotary, sampled = Rotary(model.language_model.config), model.routing.sampled
    return [
        _begin(model, illustrated),
        *(
            ConditionedLayer(layer, rotary, index, index in sampled, norm)
            for index, (layer, norm) in enumerate(_language_layers(model), start=1)
        ),
        *_routed_layers(model),
    ]


def prefix_layers(model: SPAR, illustrated: bool) -> list[Layer]:
    """Return the way from `tokens` (and `features`) to every `prefix_state_k`."""
    rotary = Rotary(model.language_model.config)
    layers = enumerate(_language_layers(model), start=1)
    return [
        _begin(model, illustrated),
        *(PrefixLayer(layer, rotary, index, norm) for index, (layer, norm) in layers),
    ]


def query_layers(model: SPAR) -> list[Layer]:
    """Return the way from `tokens` and every `prefix_state_k` to `captions`."""
    rotary, sampled = Rotary(model.language_model.config), model.routing.sampled
    return [
        BeginQueries(model.queries),
        *(
            QueryLayer(layer, rotary, index, index in sampled, norm)
            for index, (layer, norm) in enumerate(_language_layers(model), start=1)
        ),
        *_routed_layers(model),
    ]


def prefix_states(model: SPAR) -> tuple[str, ...]:
    """Return the slots that `prefix_layers` writes for `query_layers`."""
    return tuple(f"prefix_state_{index}" for index in range(len(model.language_model.layers) + 1))


def connector_layers(connector: Connector, num_queries: int) -> list[Layer]:
    """Return the way of `captions` through a connector; `num_queries` of them stand behind those of `keep`."""
    return [
        *(ConnectorLayer(layer, connector.rotary, num_queries) for layer in connector.layers),
        ProjectCaptions(connector.norm, connector.projection),
    ]


def _begin(model: SPAR, illustrated: bool) -> Layer:
    embedding = model.language_model.embed_tokens
    if illustrated:
        return EmbedIllustratedPrompt(embedding, model.queries, model.image_token_id)
    return EmbedPrompt(embedding, model.queries)


def _language_layers(model: SPAR) -> list[tuple[nn.Module, nn.Module | None]]:
    """The language model's layers, the last with the final norm."""
    *others, last = model.language_model.layers
    return [*((layer, None) for layer in others), (last, model.language_model.norm)]


def _routed_layers(model: SPAR) -> list[Layer]:
    route = RouteTokens(model.routing, model.routing.sampled, model.image_token_id)
    return [route, *connector_layers(model.connector, model.queries.weight.shape[1])]
