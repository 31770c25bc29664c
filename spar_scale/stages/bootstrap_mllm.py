"""The layers of a vision tower and a language model that train from scratch, and their published layout.

The loss is the cross-entropy of the next token where a token is predicted (`data/prompts.py`): captions, answers,
descriptions of the result of an edit. Besides, a linear head, which is not published, names the shape and the colour
that each image token shows. It gives the vision tower more information on an image than a few words do.

Slots (B samples, T tokens, N image tokens, W and D widths):
    images (B, 3, S, S) in [0, 1]   tokens (B, T) int64   counts (B, T) uint8, 1 where a token is predicted
    patches (B, N, 2) uint8, what each image token shows    hidden (B, 1 + P, W)    features (B, N, D)
    states (B, T, D)    next_token (B,), patch_naming (B,): the terms
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration, Qwen2Config

from parallel.program import Layer
from spar_scale.data.patches import NUM_LABELS, UNKNOWN
from spar_scale.data.prompts import build_tokenizer
from spar_scale.models.mllm import causal_mask, merge, next_token_loss, rotary
from spar_scale.stages.tokenizer_layers import EmbedImages, ProjectFeatures, VisionBlock

NUM_TOKENS = {"captions": 14, "questions": 40, "edits": 24, "texts": 48}
"""The longest prompt of each task, without the tokens of its picture."""


class EmbedTokens(Layer):
    """`tokens` to the first `states`, with `features` in the places of the picture."""

    reads = ("tokens", "features")
    writes = ("states",)

    def __init__(self, embedding: nn.Module, image_token_id: int):
        super().__init__()
        self.embedding, self.image_token_id = embedding, image_token_id

    def forward(self, tokens: Tensor, features: Tensor) -> dict[str, Tensor]:
        """Embed and merge."""
        return {"states": merge(self.embedding(tokens), features, tokens == self.image_token_id)}


class DecoderLayer(Layer):
    """One causal layer of the language model on `states`."""

    reads = ("states",)
    writes = ("states",)

    def __init__(self, layer: nn.Module, config: Qwen2Config):
        super().__init__()
        rope: dict[str, Any] = dict(config.rope_parameters or {})
        if rope["rope_type"] != "default":
            raise NotImplementedError(f"rotary positions of type {rope['rope_type']}")
        self.layer, self.theta = layer, float(rope["rope_theta"])
        self.head_width = config.hidden_size // config.num_attention_heads

    def forward(self, states: Tensor) -> dict[str, Tensor]:
        """Run the layer under an explicit causal mask."""
        length, device = states.shape[1], states.device
        cos, sin = rotary(length, self.head_width, self.theta, device)
        positions = (cos.to(states.dtype), sin.to(states.dtype))
        mask = causal_mask(length, device)
        return {"states": self.layer(states, attention_mask=mask, position_embeddings=positions)}


class NamePatches(Layer):
    """The term `patch_naming` (B,): the head's mean cross-entropy over a picture's tokens, shape and colour summed."""

    reads = ("features", "patches")
    writes = ("patch_naming",)

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(self, features: Tensor, patches: Tensor) -> dict[str, Tensor]:
        """Name what each token shows; a picture of which nothing is known costs nothing."""
        scores = self.head(features).float().split(NUM_LABELS, dim=-1)
        known = (patches[..., 0] != UNKNOWN).float()
        labels = patches.long() * (patches != UNKNOWN)
        each = [
            F.cross_entropy(score.transpose(1, 2), labels[..., kind], reduction="none")
            for kind, score in enumerate(scores)
        ]
        return {"patch_naming": (sum(each[1:], each[0]) * known).mean(1)}


class NextTokenLoss(Layer):
    """The term `next_token` (B,): `states` through the last norm and the head, against `tokens`."""

    reads = ("states", "tokens", "counts")
    writes = ("next_token",)

    def __init__(self, norm: nn.Module, head: nn.Module):
        super().__init__()
        self.norm, self.head = norm, head

    def forward(self, states: Tensor, tokens: Tensor, counts: Tensor) -> dict[str, Tensor]:
        """Score the answers."""
        return {"next_token": next_token_loss(self.head(self.norm(states)), tokens, counts)}


def mllm_layers(model: InternVLForConditionalGeneration) -> list[Layer]:
    """Return the model's training forward, from `images` and `tokens` to the terms `patch_naming` and `next_token`."""
    tower, language, config = model.model.vision_tower, model.model.language_model, model.config
    assert isinstance(model.naming_head, nn.Module)
    return [
        EmbedImages(tower.embeddings, frozen=False),
        *(VisionBlock(block, frozen=False) for block in tower.encoder.layer),
        ProjectFeatures(tower.layernorm, model.model.multi_modal_projector, config.downsample_ratio, frozen=False),
        NamePatches(model.naming_head),
        EmbedTokens(language.embed_tokens, config.image_token_id),
        *(DecoderLayer(layer, language.config) for layer in language.layers),
        NextTokenLoss(language.norm, model.lm_head),
    ]


def save_mllm(model: nn.Module, directory: Path, images: Tensor | None = None) -> None:
    """Write InternVL in transformers' published layout: config.json, safetensors, the tokenizer's files."""
    if not isinstance(model, InternVLForConditionalGeneration):
        raise TypeError(f"expected InternVLForConditionalGeneration, got {type(model).__name__}")
    if hasattr(model, "naming_head"):
        del model.naming_head  # no part of the published layout
    model.save_pretrained(str(directory))
    build_tokenizer().save_pretrained(str(directory))
