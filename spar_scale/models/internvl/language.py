"""Qwen2's decoder layer as a function of packed hidden states and rotary angles, and what these follow from.

Legend: B samples, T tokens of all samples one after another (`ops/packing.py`), Q query embeddings of a sample,
D width, H heads, E head width. The modules are transformers' own, so published weights fit by name. `decoder_layer`
calls their parts, because one layer serves four uses that the library's own forward does not: a frozen prompt before
trainable queries (`query_layer`), bidirectional attention, keys and values that are kept for decoding, and rotary
angles that are computed once for all layers. Tests hold each equal to the library's forward.

The model is causal and the queries stand last, so the prompt never reads them: it passes each layer without gradient,
and the queries attend to the layer's keys and values of prompt and queries. This is the full forward, not an
approximation (tests: values and gradients to 1e-5), at the cost of a backward over the queries in place of all tokens.
Hidden state L is taken after the final norm, all others before a norm.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding, apply_rotary_pos_emb

from spar_scale.ops.attention import attention
from spar_scale.ops.packing import Packing, cumulative, sample_of

KeysValues = tuple[Tensor, Tensor]
"""Keys and values (T, H_kv, E) of one layer, keys with their rotary angles applied."""


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
        """Return cosines and sines, each (T, E), fp32, for positions (T,)."""
        cos, sin = self._embedding(torch.empty(0, device=positions.device), positions[None])
        return cos[0], sin[0]


def merge(embedded: Tensor, features: Tensor, is_image: Tensor, lengths: Tensor) -> Tensor:
    """Put features (B, M, D), in order, where `is_image` (T,) is true; embedded (T, D) elsewhere.

    Features are placed sample by sample, where transformers' class scatters over the whole batch, so a batch may mix
    samples with and without an image; `lengths` (B,) are those of the samples.
    """
    samples = sample_of(lengths, len(embedded))
    count = F.pad(is_image.long().cumsum(0), (1, 0))  # image tokens up to each token, from 0
    index = (count[1:] - count[cumulative(lengths)[:-1]][samples] - 1).clamp(0, features.shape[1] - 1)
    return torch.where(is_image[:, None], features[samples, index].to(embedded.dtype), embedded)


def decoder_layer(
    layer: nn.Module,
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    packing: Packing,
    *,
    causal: bool = True,
    earlier: KeysValues | None = None,
    order: Tensor | None = None,
) -> tuple[Tensor, KeysValues]:
    """Run one decoder layer on hidden states (T, D); return them one layer further, and the keys and values.

    cos and sin (T, E) are the rotary angles of the tokens. `earlier` are keys and values of further tokens, which join
    those of the tokens: before them, and then in `order`, where given. The returned ones are all of them. `packing` has
    the bounds of both.
    """
    module = cast(Any, layer)
    block = module.self_attn
    normed = module.input_layernorm(hidden)
    queries, keys, values = (_heads(block, name, normed) for name in ("q_proj", "k_proj", "v_proj"))
    queries, keys = apply_rotary_pos_emb(queries, keys, cos.to(hidden.dtype), sin.to(hidden.dtype), unsqueeze_dim=1)
    if earlier is not None:
        keys, values = (torch.cat(pair) for pair in zip(earlier, (keys, values), strict=True))
    if order is not None:
        keys, values = keys[order], values[order]
    mixed = attention(queries, keys, values, causal=causal, scale=block.scaling, packing=packing)
    hidden = hidden + block.o_proj(mixed.flatten(1))
    return hidden + module.mlp(module.post_attention_layernorm(hidden)), (keys, values)


def query_layer(
    layer: nn.Module, prompt: Tensor, queries: Tensor, cos: Tensor, sin: Tensor, order: Tensor, packing: Packing
) -> Tensor:
    """Run the queries (B, Q, D) through one frozen decoder layer; return them one layer further.

    `prompt` (T, D) is what the layer reads of the prompts. Of the layer's work on it only keys and values are computed,
    without gradient: 7 % of that work in preset tiny, 2 % in spar_1b. cos and sin (T + B Q, E) are the angles of the
    prompts, then of the queries; `order` puts these two into the order of `packing`.
    """
    length, module = len(prompt), cast(Any, layer)
    with torch.no_grad():
        normed = module.input_layernorm(prompt)
        keys, values = (_heads(module.self_attn, name, normed) for name in ("k_proj", "v_proj"))
        angles = (part[:length].to(prompt.dtype) for part in (cos, sin))
        keys = apply_rotary_pos_emb(keys, keys, *angles, unsqueeze_dim=1)[1]
    packed = queries.flatten(0, 1)
    out, _ = decoder_layer(layer, packed, cos[length:], sin[length:], packing, earlier=(keys, values), order=order)
    return out.view_as(queries)


def _heads(block: Any, name: str, hidden: Tensor) -> Tensor:
    """A projection of hidden states (T, D) by heads (T, H, E). How many heads there are follows from its outputs."""
    return getattr(block, name)(hidden).unflatten(-1, (-1, block.head_dim))
