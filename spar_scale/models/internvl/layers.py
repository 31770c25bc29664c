"""InternVL's forward as layers: pictures to features, prompts to hidden states, and one further token.

Prompts of different lengths stand one after another, without padding. Slots (B samples, T prompt tokens of all samples,
Q queries, N = T + B Q, M picture tokens of a prompt, D and W widths, E head width, V vocabulary):
    images (..., 3, S, S) in [0, 1]      features_hidden (B', 1 + P', W)    features (B', M, D), B' = all leading dims
    tokens (T,) int64                    lengths (B,) int64, tokens of each prompt
    prefix_state_k (T, D)                hidden state k of the prompts: 0 is the embedding, the last is after the norm
    prefix_keys_k, prefix_values_k       (T, H_kv, E), of layer k, counted from 1
    queries (B, Q, D)                    query_state_k (B, Q, D)
    prompt_bounds (B + 1,) int64         where the prompts begin and end
    rotary_cos, rotary_sin (N, E)        of the prompts, then of the queries
    captions (N, D)                      the queries of a sample stand behind its prompt; so in what follows:
    caption_order (N,) int64             which of prompts, then queries, stands there
    caption_bounds (B + 1,) int64        caption_cos, caption_sin (N, E)
    position (1,)                        token (1,): the one that is read next; logits (T, V)

The vision tower names its slots after the features that it writes, so that a list can hold two of them. `longest` is a
number of tokens that no prompt with its queries exceeds.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from parallel.program import Apply, Layer
from spar_scale.models.internvl import vision
from spar_scale.models.internvl.language import Rotary, decoder_layer, merge, query_layer
from spar_scale.ops.packing import Packing, cumulative, even_bounds, position_ids


class EmbedImages(Layer):
    """Images to the vision tower's first hidden states."""

    def __init__(self, embeddings: nn.Module, reads: str, writes: str, frozen: bool):
        super().__init__()
        self.embeddings, self.reads, self.writes = embeddings, (reads,), (writes,)
        self.detached = frozenset(self.writes if frozen else ())

    def forward(self, **slots: Tensor) -> dict[str, Tensor]:
        """Cut into patches and add positions."""
        return {self.writes[0]: vision.embed(self.embeddings, slots[self.reads[0]])}


class ProjectFeatures(Layer):
    """The vision tower's last hidden states to features: norm, pixel shuffle, projector."""

    def __init__(self, layernorm: nn.Module, projector: nn.Module, ratio: float, reads: str, writes: str, frozen: bool):
        super().__init__()
        self.layernorm, self.projector, self.ratio = layernorm, projector, ratio
        self.reads, self.writes = (reads,), (writes,)
        self.detached = frozenset(self.writes if frozen else ())

    def forward(self, **slots: Tensor) -> dict[str, Tensor]:
        """Project."""
        return {self.writes[0]: vision.project(self.layernorm, self.projector, slots[self.reads[0]], self.ratio)}


class EmbedPrompt(Layer):
    """`tokens` to `prefix_state_0`, with picture features, where there are some, in the places of `image_token_id`."""

    writes = ("prefix_state_0",)

    def __init__(self, embedding: nn.Module, image_token_id: int, features: str | None, frozen: bool):
        super().__init__()
        self.embedding, self.image_token_id, self.features = embedding, image_token_id, features
        self.reads = ("tokens",) if features is None else ("tokens", "lengths", features)
        self.detached = frozenset(self.writes if frozen else ())

    def forward(self, tokens: Tensor, **slots: Tensor) -> dict[str, Tensor]:
        """Embed the tokens and place the features."""
        embedded = self.embedding(tokens)
        if self.features is not None:
            is_image = tokens == self.image_token_id
            embedded = merge(embedded, slots[self.features], is_image, slots["lengths"])
        return {"prefix_state_0": embedded}


class QueryPositions(Layer):
    """Bounds of prompts, and rotary angles of prompts with `num_queries` queries behind each, once for all layers."""

    reads = ("tokens", "lengths", "caption_order")
    writes = ("prompt_bounds", "rotary_cos", "rotary_sin", "caption_cos", "caption_sin")
    derived = True

    def __init__(self, rotary: Rotary, num_queries: int):
        super().__init__()
        self.rotary, self.num_queries = rotary, num_queries

    def forward(self, tokens: Tensor, lengths: Tensor, caption_order: Tensor) -> dict[str, Tensor]:
        """Compute them."""
        behind = lengths[:, None] + torch.arange(self.num_queries, device=lengths.device)
        cos, sin = self.rotary(torch.cat([position_ids(lengths, len(tokens)), behind.flatten()]))
        values = (cumulative(lengths), cos, sin, cos[caption_order], sin[caption_order])
        return dict(zip(self.writes, values, strict=True))


class PromptPositions(Layer):
    """Bounds and rotary angles of prompts alone."""

    reads = ("tokens", "lengths")
    writes = ("prompt_bounds", "rotary_cos", "rotary_sin")
    derived = True

    def __init__(self, rotary: Rotary):
        super().__init__()
        self.rotary = rotary

    def forward(self, tokens: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Compute them."""
        values = (cumulative(lengths), *self.rotary(position_ids(lengths, len(tokens))))
        return dict(zip(self.writes, values, strict=True))


class PrefixLayer(Layer):
    """Layer `index` (from 1) of the language model on prompts; the last one's state is that after the final norm."""

    def __init__(self, layer: nn.Module, index: int, norm: nn.Module | None, longest: int, frozen: bool):
        super().__init__()
        self.layer, self.norm, self.longest = layer, norm, longest
        self.before = f"prefix_state_{index - 1}"
        self.reads = (self.before, "rotary_cos", "rotary_sin", "prompt_bounds")
        self.writes = (f"prefix_state_{index}", f"prefix_keys_{index}", f"prefix_values_{index}")
        self.detached = frozenset(self.writes if frozen else ())

    def forward(self, rotary_cos: Tensor, rotary_sin: Tensor, prompt_bounds: Tensor, **state: Tensor):
        """Run the layer."""
        hidden, packing = state[self.before], Packing.same(prompt_bounds, self.longest)
        angles = rotary_cos[: len(hidden)], rotary_sin[: len(hidden)]
        hidden, kept = decoder_layer(self.layer, hidden, *angles, packing)
        hidden = hidden if self.norm is None else self.norm(hidden)
        return dict(zip(self.writes, (hidden, *kept), strict=True))


class QueryLayer(Layer):
    """Layer `index` (from 1) of the frozen language model on the queries, on what the layer reads of the prompts."""

    def __init__(self, layer: nn.Module, index: int, sampled: bool, norm: nn.Module | None, longest: int):
        super().__init__()
        self.layer, self.norm, self.longest = layer, norm, longest
        self.prompt = f"prefix_state_{index - 1}"
        self.reads = (self.prompt, "queries", "rotary_cos", "rotary_sin", "caption_order", "caption_bounds")
        self.writes = ("queries", f"query_state_{index}") if sampled else ("queries",)

    def forward(
        self,
        queries: Tensor,
        rotary_cos: Tensor,
        rotary_sin: Tensor,
        caption_order: Tensor,
        caption_bounds: Tensor,
        **state: Tensor,
    ):
        """Run the layer; the last one's state is that after the final norm."""
        batch, number, _ = queries.shape
        packing = Packing(even_bounds(batch, number, queries.device), caption_bounds, number, self.longest)
        angles = rotary_cos, rotary_sin
        queries = query_layer(self.layer, state[self.prompt], queries, *angles, caption_order, packing)
        after = queries if self.norm is None else self.norm(queries)
        return dict(zip(self.writes, (queries, after), strict=False))


class BidirectionalLayer(Layer):
    """A decoder layer on `captions` (N, D) in which every token attends to all of its sample."""

    reads = ("captions", "caption_bounds", "caption_cos", "caption_sin")
    writes = ("captions",)

    def __init__(self, layer: nn.Module, longest: int):
        super().__init__()
        self.layer, self.longest = layer, longest

    def forward(self, captions: Tensor, caption_bounds: Tensor, caption_cos: Tensor, caption_sin: Tensor):
        """Run the layer."""
        packing = Packing.same(caption_bounds, self.longest)
        return {"captions": decoder_layer(self.layer, captions, caption_cos, caption_sin, packing, causal=False)[0]}


class TokenPosition(Layer):
    """Rotary angles of the token at `position`."""

    reads = ("position",)
    writes = ("rotary_cos", "rotary_sin")

    def __init__(self, rotary: Rotary):
        super().__init__()
        self.rotary = rotary

    def forward(self, position: Tensor) -> dict[str, Tensor]:
        """Compute them."""
        return dict(zip(self.writes, self.rotary(position), strict=True))


class DecodingLayer(Layer):
    """Layer `index` on one further token, whose keys and values join those of all tokens before it."""

    def __init__(self, layer: nn.Module, index: int):
        super().__init__()
        self.layer, self.kept = layer, (f"prefix_keys_{index}", f"prefix_values_{index}")
        self.reads = ("token_state", "rotary_cos", "rotary_sin", *self.kept)
        self.writes = ("token_state", *self.kept)

    def forward(self, token_state: Tensor, rotary_cos: Tensor, rotary_sin: Tensor, **kept: Tensor):
        """Run the layer."""
        keys, values = (kept[name] for name in self.kept)
        packing = Packing.even(1, 1, len(keys) + 1, keys.device)
        state, longer = decoder_layer(self.layer, token_state, rotary_cos, rotary_sin, packing, earlier=(keys, values))
        return dict(zip(self.writes, (state, *longer), strict=True))


def vision_layers(
    tower: nn.Module, projector: nn.Module, ratio: float, frozen: bool, reads: str = "images", writes: str = "features"
) -> list[Layer]:
    """Return the way from images to features."""
    hidden = f"{writes}_hidden"
    return [
        EmbedImages(tower.get_submodule("embeddings"), reads, hidden, frozen),
        *(Apply(block, (hidden,), hidden, frozen) for block in tower.get_submodule("encoder.layer").children()),
        ProjectFeatures(tower.get_submodule("layernorm"), projector, ratio, hidden, writes, frozen),
    ]


def prompt_layers(
    trunk: nn.Module, image_token_id: int, features: str | None, longest: int, frozen: bool
) -> list[Layer]:
    """Return the way from `tokens`, and the slot `features`, if any, to every `prefix_state_k`."""
    return [
        EmbedPrompt(trunk.get_submodule("embed_tokens"), image_token_id, features, frozen),
        *(PrefixLayer(layer, index, norm, longest, frozen) for index, layer, norm in _numbered(trunk)),
    ]


def query_layers(trunk: nn.Module, sampled: Iterable[int], longest: int) -> list[Layer]:
    """Return the way of `queries` through the model, on every `prefix_state_k`; `sampled` states are written."""
    return [QueryLayer(layer, index, index in set(sampled), norm, longest) for index, layer, norm in _numbered(trunk)]


def decoding_layers(trunk: nn.Module, head: nn.Module, rotary: Rotary) -> list[Layer]:
    """Return the way of one further `token` at `position` to its `logits`, past all keys and values before it."""
    return [
        Apply(trunk.get_submodule("embed_tokens"), ("token",), "token_state"),
        TokenPosition(rotary),
        *(DecodingLayer(layer, index) for index, layer, _ in _numbered(trunk)),
        Apply(trunk.get_submodule("norm"), ("token_state",), "token_state"),
        Apply(head, ("token_state",), "logits"),
    ]


def logits_layer(head: nn.Module, num_layers: int) -> Layer:
    """Return the way from the last `prefix_state_k` to `logits`."""
    return Apply(head, (f"prefix_state_{num_layers}",), "logits")


def _numbered(trunk: nn.Module) -> list[tuple[int, nn.Module, nn.Module | None]]:
    """The layers with their numbers from 1, the last with the final norm.

    Raises TypeError for another model's layers, and ValueError for attention that `decoder_layer` would not honour.
    """
    layers = list(trunk.get_submodule("layers").children())
    for layer in layers:
        if not isinstance(layer, Qwen2DecoderLayer):
            raise TypeError(f"{type(layer).__name__} is not a Qwen2DecoderLayer")
        if layer.self_attn.sliding_window is not None:
            raise ValueError("a language model with sliding-window attention is not supported")
    norms = [None] * (len(layers) - 1) + [trunk.get_submodule("norm")]
    return list(zip(range(1, len(layers) + 1), layers, norms, strict=True))
