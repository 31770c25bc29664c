"""The shapes of InternVL: vision tower and language model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VisionShape:
    """InternVL's vision tower and projector; tokens on a side = picture_size / patch_size * downsample_ratio."""

    image_size: int  # pixels, for which it has position embeddings
    patch_size: int  # pixels
    width: int
    layers: int
    heads: int
    mlp_width: int
    downsample_ratio: float  # of the pixel shuffle before the projector
    output_width: int  # D, the width of the features: that of the language model
    attention_bias: bool = True
    layer_scale: float = 0.1
    read_size: int | None = None  # pixels of the pictures, where others than image_size: the positions are interpolated

    @property
    def picture_size(self) -> int:
        """Pixels on a side of the pictures that it reads."""
        return self.read_size or self.image_size

    @property
    def grid(self) -> int:
        """Tokens on a side after the pixel shuffle."""
        return int(self.picture_size // self.patch_size * self.downsample_ratio)

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return self.grid**2

    @property
    def pixels_per_token(self) -> float:
        """Pixels on a side of a token."""
        return self.patch_size / self.downsample_ratio


@dataclass(frozen=True)
class LanguageShape:
    """The Qwen2 language model."""

    width: int  # D
    layers: int
    heads: int
    key_value_heads: int
    mlp_width: int
    vocab_size: int  # at least the tokenizer's words
    image_token_id: int  # replaced by an image feature
    max_positions: int
    rope_theta: float = 1e6
    rope_factor: float | None = None  # dynamic scaling of sequences longer than max_positions, None for none
    initializer_range: float = 0.02  # deviation of linear weights before training
    word_range: float = 0.02  # deviation of word embeddings before training
