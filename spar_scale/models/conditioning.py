"""Frozen-prefix conditioning: a frozen causal language model read by trainable queries.

Legend: B batch, P prefix tokens (text and reference image, padded), Q queries, D width, K sampled states.
The model is causal and the queries stand last, so the prefix never sees them: it passes each layer
without gradient, and the queries attend to the layer's keys and values of prefix and queries. This is
the full pass, not an approximation (tests: values and gradients to 1e-5), at the cost of one backward
over Q tokens in place of P + Q.

Three traps: a mask is always given (without one transformers' causal shortcut aligns the queries with
the start of the prefix); transformers' own gradient checkpointing drops the cache, so a recomputed
block must be the whole of `conditioned_layer` or `query_layer`, whose cache is made inside; hidden state L is taken
after the final norm (`final_state`), all others are raw.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, Qwen2Config, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding, apply_rotary_pos_emb

from spar_scale.ops.transformers_attention import IMPLEMENTATION

_MASKED_BACKENDS = (IMPLEMENTATION, "sdpa")  # read a boolean (B, 1, N_q, N_k) mask; eager would add it as 0 and 1


class Rotary:
    """Rotary position embeddings of a Qwen2 config, at positions below its `max_position_embeddings`.

    Not an nn.Module: a module's buffers follow the weights to bf16, and inverse frequencies in bf16 turn
    distant positions wrongly. The dynamic scaling of the published models acts on longer sequences alone,
    which a preset refuses, and would wait for the device at every call to learn the length: it is left
    out, bit-equal. Raises ValueError for any other scaling.
    """

    def __init__(self, config: Qwen2Config):
        rope = dict(config.rope_parameters or {})
        if rope.get("rope_type") not in ("default", "dynamic"):
            raise ValueError(f"rotary positions of type {rope.get('rope_type')}: default or dynamic is supported")
        config = copy.deepcopy(config)
        config.rope_parameters = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
        with torch.device("cpu"):  # a value, also where the model around it is built on the meta device
            self._embedding = Qwen2RotaryEmbedding(config)

    def __call__(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin, each (B, N, head width), for positions (B, N), in the dtype of `hidden`."""
        return self._embedding(hidden, positions)


class QueryEmbeddings(nn.Module):
    """The learnable queries, one for each position of the target grid, drawn from N(0, 1)."""

    def __init__(self, num_queries: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, num_queries, width))

    def forward(self, batch: int) -> Tensor:
        """Return the queries for `batch` samples (B, Q, D)."""
        return self.weight.expand(batch, -1, -1)

    def _init_weights(self, module: nn.Module) -> None:
        nn.init.normal_(self.weight)


def extend_padding_mask(prefix_keep: Tensor, num_queries: int) -> Tensor:
    """Extend the prefix's padding mask (B, P), nonzero where a token is real, by the queries: (B, P + Q)."""
    return torch.cat([prefix_keep, prefix_keep.new_ones(prefix_keep.shape[0], num_queries)], dim=1)


def positions(keep: Tensor) -> Tensor:
    """Position ids (B, N) that count the real tokens of a padding mask (B, N) from 0."""
    return (keep.bool().cumsum(dim=1) - 1).clamp_min(0)


def causal_masks(prefix_keep: Tensor, num_queries: int) -> tuple[Tensor, Tensor]:
    """Boolean masks of the prefix (B, 1, P, P) and of the queries (B, 1, Q, P + Q), True where attended.

    Padding is attended by itself alone, so that its softmax stays finite.
    """
    keep = extend_padding_mask(prefix_keep, num_queries).bool()
    num_prefix, num_tokens = prefix_keep.shape[1], keep.shape[1]
    causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=keep.device).tril()
    itself = torch.eye(num_tokens, dtype=torch.bool, device=keep.device)
    prefix = (causal & keep[:, None, None, :] | itself)[:, :, :num_prefix, :num_prefix]
    return prefix, causal[num_prefix:] & keep[:, None, None, :]


def conditioned_layer(
    layer: nn.Module, rotary: Rotary, prefix: Tensor, queries: Tensor, prefix_keep: Tensor
) -> tuple[Tensor, Tensor]:
    """Pass one frozen decoder layer: (prefix (B, P, D), queries (B, Q, D)) to the same, one layer further.

    `prefix_keep` (B, P) is nonzero where a prefix token is real, padded on either side. The prefix comes
    out without gradient. Raises ValueError for a layer that would ignore the mask or the cache, TypeError
    for one of another model.
    """
    _check(layer)
    cache = DynamicCache()
    prefix = _pass_prefix(layer, rotary, prefix, prefix_keep, cache)
    return prefix, _pass_queries(layer, rotary, queries, prefix_keep, cache)


def prefix_layer(layer: nn.Module, rotary: Rotary, prefix: Tensor, prefix_keep: Tensor) -> Tensor:
    """The prefix's half of `conditioned_layer`: (B, P, D) one layer further, without gradient."""
    _check(layer)
    return _pass_prefix(layer, rotary, prefix, prefix_keep, DynamicCache())


def query_layer(layer: Any, rotary: Rotary, prefix: Tensor, queries: Tensor, prefix_keep: Tensor) -> Tensor:
    """The queries' half of `conditioned_layer`: (B, Q, D) one layer further, bit-equal to the whole.

    `prefix` (B, P, D) is what enters the layer; of the layer's work on it only the keys and values are
    done again, a fifteenth of it in preset tiny.
    """
    _check(layer)
    cache, attention = DynamicCache(), layer.self_attn
    with torch.no_grad():
        hidden = layer.input_layernorm(prefix)
        heads = (*hidden.shape[:-1], -1, attention.head_dim)
        keys = attention.k_proj(hidden).view(heads).transpose(1, 2)
        values = attention.v_proj(hidden).view(heads).transpose(1, 2)
        keys = apply_rotary_pos_emb(keys, keys, *rotary(prefix, positions(prefix_keep)))[1]
        cache.update(keys, values, attention.layer_idx)
    return _pass_queries(layer, rotary, queries, prefix_keep, cache)


def final_state(norm: nn.Module, prefix: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden state L: what the last layer wrote for prefix and queries, after the final norm."""
    with torch.no_grad():
        prefix = norm(prefix)
    return prefix, norm(queries)


def sampled_hidden_states(
    model: Qwen2Model, prefix: Tensor, queries: Tensor, prefix_keep: Tensor, sampled: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Run all layers; return the sampled hidden states of the prefix (B, K, P, D) and queries (B, K, Q, D).

    `prefix` and `queries` are embeddings; indices are transformers' (0 the embedding, L after the norm).
    """
    rotary, num_layers = Rotary(model.config), len(model.layers)
    states = [(prefix.detach(), queries)]
    for layer in model.layers:
        states.append(conditioned_layer(layer, rotary, *states[-1], prefix_keep))
    states[num_layers] = final_state(model.norm, *states[num_layers])
    prefixes, query_states = zip(*(states[index] for index in sampled), strict=True)
    return torch.stack(prefixes, dim=1), torch.stack(query_states, dim=1)


def _pass_prefix(layer: Any, rotary: Rotary, prefix: Tensor, prefix_keep: Tensor, cache: DynamicCache) -> Tensor:
    with torch.no_grad():
        return layer(
            prefix,
            attention_mask=causal_masks(prefix_keep, 0)[0],
            position_embeddings=rotary(prefix, positions(prefix_keep)),
            past_key_values=cache,
            use_cache=True,
        )


def _pass_queries(layer: Any, rotary: Rotary, queries: Tensor, prefix_keep: Tensor, cache: DynamicCache) -> Tensor:
    num_queries = queries.shape[1]
    places = positions(extend_padding_mask(prefix_keep, num_queries))
    return layer(
        queries,
        attention_mask=causal_masks(prefix_keep, num_queries)[1],
        position_embeddings=rotary(queries, places[:, -num_queries:]),
        past_key_values=cache,
        use_cache=True,
    )


def _check(layer: Any) -> None:
    if not isinstance(layer, Qwen2DecoderLayer):
        raise TypeError(f"{type(layer).__name__} is not a Qwen2DecoderLayer")
    backend = layer.self_attn.config._attn_implementation
    if backend not in _MASKED_BACKENDS:
        raise ValueError(f"attention '{backend}' does not read a boolean mask, one of {_MASKED_BACKENDS} does")
    if layer.self_attn.sliding_window is not None:
        raise ValueError("sliding-window attention is not conditioned on a frozen prefix")
    if layer.gradient_checkpointing and layer.training:
        raise ValueError("transformers' gradient checkpointing drops the cache: recompute conditioned_layer as a whole")
