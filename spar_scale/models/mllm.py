"""The multimodal language model: transformers' InternVL (vision tower, projector, Qwen2) from scratch.

Shapes: images (B, 3, S, S) in [0, 1]; features f_v (B, N, D); tokens (B, T) int64, padded on the right;
states (B, T, D), the residual stream; logits (B, T, V). The modules are transformers' own, so published
weights fit by name. The forward is cut into pieces (`merge`, the decoder layers under `causal_mask` and
`rotary`, `next_token_loss`) that a pipeline can hold apart; a test keeps their composition equal to
`InternVLForConditionalGeneration`. The mask is always explicit, and the rotary angles are computed here
in fp32: an engine in bf16 would round the frequencies that transformers keeps as a buffer.

`merge` places features sample by sample where the class scatters over the whole batch, so a batch may
mix samples with and without an image.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Config, Qwen2Model

from spar_scale.models.presets import Preset
from spar_scale.models.vision import features, vision_config
from spar_scale.ops.transformers_attention import IMPLEMENTATION


def build_mllm(preset: Preset) -> InternVLForConditionalGeneration:
    """Return the model of a preset, weights at random from the global generator (call `initialise`)."""
    model = InternVLForConditionalGeneration(mllm_config(preset))
    model.set_attn_implementation(IMPLEMENTATION)
    return model


def mllm_config(preset: Preset) -> InternVLConfig:
    """Return the whole InternVL config of a preset."""
    shape, config = preset.language, vision_config(preset)
    rope: dict[str, str | float] = {"rope_type": "default", "rope_theta": shape.rope_theta}
    if shape.rope_factor is not None:
        rope |= {"rope_type": "dynamic", "factor": shape.rope_factor}
    config.text_config = Qwen2Config(
        vocab_size=shape.vocab_size,
        hidden_size=preset.streams.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        intermediate_size=shape.mlp_width,
        max_position_embeddings=shape.max_positions,
        rope_parameters=rope,
        initializer_range=shape.initializer_range,
        tie_word_embeddings=False,
    )
    config.tie_word_embeddings = False  # the one that counts; a tied matrix could not stand at both ends of a pipeline
    config.image_token_id = shape.image_token_id
    config.image_seq_length = preset.vision.grid**2
    return config


def own_features(mllm: InternVLForConditionalGeneration) -> Callable[[Tensor], Tensor]:
    """Images (B, 3, S, S) in [0, 1] to features (B, N, D) by the model's own vision tower and projector."""
    tower, projector = mllm.model.vision_tower, mllm.model.multi_modal_projector
    return lambda images: features(tower, projector, images, mllm.config.downsample_ratio)


def merge(embedded: Tensor, features: Tensor, is_image: Tensor) -> Tensor:
    """Put features (B, N, D), in order, where `is_image` (B, T) is true; embedded (B, T, D) elsewhere."""
    index = (is_image.long().cumsum(1) - 1).clamp(0, features.shape[1] - 1)
    placed = features.gather(1, index[..., None].expand(-1, -1, features.shape[2]))
    return torch.where(is_image[..., None], placed.to(embedded.dtype), embedded)


@functools.cache
def causal_mask(num_tokens: int, device: torch.device) -> Tensor:
    """Return the mask (1, 1, T, T), true where a token attends: itself and what is before it.

    Padding on the right needs no mask of its own: nothing before it sees it.
    """
    return torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device).tril()[None, None]


@functools.cache
def rotary(num_tokens: int, head_width: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (cos, sin) of the rotary angles, each (1, T, head_width), fp32, for positions 0 ... T - 1."""
    frequencies = theta ** -(torch.arange(0, head_width, 2, device=device).float() / head_width)
    angles = torch.outer(torch.arange(num_tokens, device=device).float(), frequencies)
    both = torch.cat([angles, angles], 1)[None]
    return both.cos(), both.sin()


def next_token_loss(logits: Tensor, tokens: Tensor, counts: Tensor) -> Tensor:
    """Return the mean cross-entropy (B,), fp32, of each sample's counted tokens.

    `counts` (B, T) is nonzero where a token is to be predicted from those before it; a sample that counts none
    has loss 0. The first token is never predicted.
    """
    each = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), tokens[:, 1:], reduction="none")
    counted = counts[:, 1:].float()
    return (each * counted).sum(1) / counted.sum(1).clamp_min(1)


@torch.no_grad()
def greedy(language: Qwen2Model, head: nn.Module, embedded: Tensor, stop: frozenset[int], limit: int) -> list[int]:
    """Continue one prompt, given by its embeddings (1, T, D) with the picture's features merged; return the new tokens.

    Ends before a token of `stop`, or after `limit` tokens. The answers are a few tokens long, so nothing is cached.
    """
    new: list[int] = []
    while len(new) < limit:
        state = language(inputs_embeds=embedded, use_cache=False).last_hidden_state[:, -1]
        best = int(head(state).argmax())
        if best in stop:
            break
        new.append(best)
        token = language.embed_tokens(torch.tensor([[best]], device=embedded.device))
        embedded = torch.cat([embedded, token], 1)
    return new
