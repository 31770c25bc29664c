"""From a prompt to captions of the diffusion transformer, as layers: language model, routing, connector.

Prompts stand one after another, without padding (`ops/packing.py`); as captions each is followed by its queries.
Slots (B samples, M pictures of a sample: the target first, T prompt tokens of all samples, Q queries, N = T + B Q,
D width, C caption channels, K sampled states):
    features (B * M, G, D) of all pictures; target_features (B, G, D); reference_features (B, (M - 1) * G, D)
    tokens (T,) int64    lengths (B,) int64, tokens of each prompt
    prefix_state_k (T, D), query_state_k (B, Q, D): hidden state k; 0 is the embedding, the last is after the norm
    captions (N, D), at the end (N, C)    routing_weights (N, K)    caption_bounds (B + 1,) int64
    caption_order (N,) int64: which of all prompt tokens, then all queries, a caption is

The prompt's states have no gradient and depend on the sample alone, so they can be stored; the way from them to
`captions` is the rest of the same list. A layer of the language model stands twice, for the prompt and then for the
queries, so that recomputing the queries' activations does not run the prompt again.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from parallel.program import Apply, Layer
from spar_scale.models.roles import LanguageModel
from spar_scale.models.spar.model import SPAR, keep_references
from spar_scale.ops.packing import cumulative, order_behind

TARGET, REFERENCES = "target_features", "reference_features"


class SplitFeatures(Layer):
    """`features` of all pictures of the samples to those of the target and of the pictures to edit."""

    reads = ("features", "lengths")
    writes = (TARGET, REFERENCES)
    detached = frozenset(writes)

    def forward(self, features: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Split. Without pictures to edit there is one feature of zeros: a pipeline sends no empty tensor."""
        pictures = features.unflatten(0, (len(lengths), -1))
        references = pictures[:, 1:].flatten(1, 2) if pictures.shape[1] > 1 else torch.zeros_like(pictures[:, 0, :1])
        return {TARGET: pictures[:, 0], REFERENCES: references}


class CaptionBounds(Layer):
    """`lengths` to `caption_bounds`, with `num_queries` queries behind each prompt."""

    reads = ("lengths",)
    writes = ("caption_bounds",)
    derived = True

    def __init__(self, num_queries: int):
        super().__init__()
        self.num_queries = num_queries

    def forward(self, lengths: Tensor) -> dict[str, Tensor]:
        """Add up."""
        return {"caption_bounds": cumulative(lengths + self.num_queries)}


class CaptionOrder(Layer):
    """`tokens` and `lengths` to `caption_order`, with `num_queries` queries behind each prompt."""

    reads = ("tokens", "lengths")
    writes = ("caption_order",)
    derived = True

    def __init__(self, num_queries: int):
        super().__init__()
        self.num_queries = num_queries

    def forward(self, tokens: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Compute it."""
        return {"caption_order": order_behind(lengths, len(tokens), self.num_queries)}


class BeginQueries(Layer):
    """The `queries`, one set for each sample."""

    reads = ("lengths",)
    writes = ("queries",)

    def __init__(self, queries: nn.Module):
        super().__init__()
        self.queries = queries

    def forward(self, lengths: Tensor) -> dict[str, Tensor]:
        """Repeat them."""
        return {"queries": self.queries(len(lengths))}


class RouteTokens(Layer):
    """The sampled states, routed token by token, to `captions`; the picture to edit stays as it was embedded."""

    writes = ("captions", "routing_weights")
    detached = frozenset({"routing_weights"})

    def __init__(self, routing: nn.Module, sampled: tuple[int, ...], image_token_id: int):
        super().__init__()
        self.routing, self.sampled, self.image_token_id = routing, sampled, image_token_id
        states = (f"{part}_state_{index}" for index in sampled for part in ("prefix", "query"))
        self.reads = (*states, "prefix_state_0", "tokens", "caption_order")

    def forward(self, tokens: Tensor, caption_order: Tensor, **states: Tensor) -> dict[str, Tensor]:
        """Stack, route, put the picture back."""
        prompts, queries = ([states[f"{part}_state_{k}"] for k in self.sampled] for part in ("prefix", "query"))
        stacked = [torch.cat([prompt, query.flatten(0, 1)]) for prompt, query in zip(prompts, queries, strict=True)]
        routed, weights = self.routing(torch.stack(stacked))
        captions = keep_references(routed, states["prefix_state_0"], tokens == self.image_token_id)
        return {"captions": captions[caption_order], "routing_weights": weights[caption_order]}


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


def conditioning_layers(model: SPAR, language: LanguageModel, illustrated: bool, longest: int) -> list[Layer]:
    """Return the way from `tokens` and `lengths` (and `features`, where prompts are `illustrated`) to `captions`.

    No prompt with its queries has more than `longest` tokens.
    """
    trunk, sampled = model.language_model, model.routing.sampled
    num_queries = model.queries.weight.shape[1]
    embed, *prompt = language.prompt_layers(trunk, REFERENCES if illustrated else None, longest)
    return [
        *([SplitFeatures()] if illustrated else []),
        CaptionBounds(num_queries),
        CaptionOrder(num_queries),
        language.position_layer(trunk, num_queries),
        embed,
        BeginQueries(model.queries),
        *itertools.chain.from_iterable(zip(prompt, language.query_layers(trunk, sampled, longest), strict=True)),
        RouteTokens(model.routing, sampled, language.image_token_id),
        *(language.bidirectional_layer(layer, longest) for layer in model.connector.layers),
        ProjectCaptions(model.connector.norm, model.connector.projection),
    ]


def answering_layers(model: SPAR, language: LanguageModel) -> list[Layer]:
    """Return the way from the prompt's last state to `logits`."""
    return [Apply(model.lm_head, (f"prefix_state_{language.layers}",), "logits")]


def prompt_states(language: LanguageModel) -> tuple[str, ...]:
    """Return the slots of the prompt's hidden states that the layers behind them read."""
    return tuple(f"prefix_state_{index}" for index in range(language.layers + 1))
