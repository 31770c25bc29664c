"""Qwen2's decoder layer as a function of hidden states, rotary angles and a mask, and what these follow from.

Legend: B samples, P prompt tokens (padded), Q query embeddings, N = P + Q, T tokens of any kind, D width, H heads,
E head width. The modules are transformers' own, so published weights fit by name. `decoder_layer` calls their parts,
because one layer serves four uses that the library's own forward does not: a frozen prompt before trainable queries
(`query_layer`), bidirectional attention, keys and values that are kept for decoding, and rotary angles and masks that
are computed once for all layers. Tests hold each equal to the library's forward.

The model is causal and the queries stand last, so the prompt never reads them: it passes each layer without gradient,
and the queries attend to the layer's keys and values of prompt and queries. This is the full forward, not an
approximation (tests: values and gradients to 1e-5), at the cost of one backward over Q tokens in place of P + Q.
Hidden state L is taken after the final norm, all others before a norm.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding, apply_rotary_pos_emb

from spar_scale.ops.attention import attention

KeysValues = tuple[Tensor, Tensor]
"""Keys and values (B, T, H_kv, E) of one layer, keys with their rotary angles applied."""


class Rotary:
    """Rotary angles of a Qwen2 config, at positions below its `max_position_embeddings`.

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

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, each (B, T, E), fp32, for positions (B, T)."""
        return self._embedding(torch.empty(0, device=positions.device), positions)


def extend_padding_mask(keep: Tensor, num_queries: int) -> Tensor:
    """Extend a prompt's padding mask (B, P), nonzero where a token is real, by the queries: (B, P + Q)."""
    return torch.cat([keep, keep.new_ones(keep.shape[0], num_queries)], dim=1)


def causal_masks(keep: Tensor, num_queries: int) -> tuple[Tensor, Tensor]:
    """Return boolean masks of the prompt (B, 1, P, P) and of the queries (B, 1, Q, P + Q), True where attended.

    A padding token attends to itself alone, so that its softmax stays finite.
    """
    real = extend_padding_mask(keep, num_queries).bool()
    num_prompt, num_tokens = keep.shape[1], real.shape[1]
    causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=keep.device).tril()
    itself = torch.eye(num_tokens, dtype=torch.bool, device=keep.device)
    prompt = (causal & real[:, None, None, :] | itself)[:, :, :num_prompt, :num_prompt]
    return prompt, causal[num_prompt:] & real[:, None, None, :]


def merge(embedded: Tensor, features: Tensor, is_image: Tensor) -> Tensor:
    """Put features (B, M, D), in order, where `is_image` (B, T) is true; embedded (B, T, D) elsewhere.

    Features are placed sample by sample, where transformers' class scatters over the whole batch, so a batch may mix
    samples with and without an image.
    """
    index = (is_image.long().cumsum(1) - 1).clamp(0, features.shape[1] - 1)
    placed = features.gather(1, index[..., None].expand(-1, -1, features.shape[2]))
    return torch.where(is_image[..., None], placed.to(embedded.dtype), embedded)


def decoder_layer(
    layer: nn.Module, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, earlier: KeysValues | None = None
) -> tuple[Tensor, KeysValues]:
    """Run one decoder layer on hidden states (B, T, D); return them one layer further, and the keys and values.

    cos and sin (B, T, E) are the rotary angles of the tokens. `earlier` are keys and values of tokens before them;
    the returned ones are all of them. `mask` (B, 1, T, all) is True where a token attends, None for everywhere.
    """
    module = cast(Any, layer)
    block = module.self_attn
    normed = module.input_layernorm(hidden)
    queries, keys, values = (_heads(block, name, normed) for name in ("q_proj", "k_proj", "v_proj"))
    queries, keys = apply_rotary_pos_emb(queries, keys, cos.to(hidden.dtype), sin.to(hidden.dtype), unsqueeze_dim=2)
    if earlier is not None:
        keys, values = (torch.cat(pair, dim=1) for pair in zip(earlier, (keys, values), strict=True))
    mixed = attention(queries, keys, values, mask=mask, scale=block.scaling)
    hidden = hidden + block.o_proj(mixed.flatten(2))
    return hidden + module.mlp(module.post_attention_layernorm(hidden)), (keys, values)


def query_layer(layer: nn.Module, prompt: Tensor, queries: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
    """Run the queries (B, Q, D) through one frozen decoder layer; return them one layer further.

    `prompt` (B, P, D) is what the layer reads of the prompt. Of the layer's work on it only keys and values are
    computed, without gradient: 7 % of that work in preset tiny, 2 % in spar_1b. cos and sin (B, P + Q, E).
    """
    length, module = prompt.shape[1], cast(Any, layer)
    with torch.no_grad():
        normed = module.input_layernorm(prompt)
        keys, values = (_heads(module.self_attn, name, normed) for name in ("k_proj", "v_proj"))
        angles = (part[:, :length].to(prompt.dtype) for part in (cos, sin))
        keys = apply_rotary_pos_emb(keys, keys, *angles, unsqueeze_dim=2)[1]
    return decoder_layer(layer, queries, cos[:, length:], sin[:, length:], mask, (keys, values))[0]


def _heads(block: Any, name: str, hidden: Tensor) -> Tensor:
    """A projection of hidden states by heads (B, T, H, E). How many heads there are follows from its outputs."""
    return getattr(block, name)(hidden).unflatten(-1, (-1, block.head_dim))
