"""The small modules that SPAR's streams are made of, and the base of the models that hold frozen parts.

Shapes: B images, N tokens, T tokens of all samples one after another, D width. Projections of the attention are
separate nn.Linear modules and the head width (not their number) is stored, so that a column-parallel cut needs no
change here.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from spar_scale.ops.attention import attention
from spar_scale.ops.packing import Packing


class Composition(nn.Module):
    """A model made of parts, some of them frozen."""

    def train(self, mode: bool = True) -> Composition:
        """Set the mode; a part whose parameters are all frozen stays in eval mode."""
        super().train(mode)
        for part in self.children():
            part.train(mode and any(parameter.requires_grad for parameter in part.parameters()))
        return self


class ResBlock(nn.Module):
    """x + Linear(GELU(Linear(LN(x)))), no expansion (SPAR, residual block of the streams)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.linear_1 = nn.Linear(width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, D) to (B, N, D)."""
        return x + self.linear_2(F.gelu(self.linear_1(self.norm(x))))


class LatentHead(nn.Module):
    """LN -> Linear(D, C) -> GELU -> Linear(C, C): tokens to latent channels."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.linear_1 = nn.Linear(width, channels)
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, D) to (B, N, C)."""
        return self.linear_2(F.gelu(self.linear_1(self.norm(x))))


class SelfAttention(nn.Module):
    """Bidirectional multi-head self-attention without positions."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.head_width = width // heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        """Map (B, N, D) to (B, N, D), or, with the packing of samples, (T, D) to (T, D)."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_width)) for projection in (self.query, self.key, self.value)
        )
        return self.output(attention(q, k, v, packing=packing).flatten(-2))


class TransformerLayer(nn.Module):
    """Pre-norm Transformer encoder layer: x + A(LN(x)), then x + FFN(LN(x)), FFN 4x with GELU."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.linear_1 = nn.Linear(width, 4 * width)
        self.linear_2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        """Map (B, N, D) to (B, N, D), or, with the packing of samples, (T, D) to (T, D)."""
        x = x + self.attention(self.attention_norm(x), packing)
        return x + self.linear_2(F.gelu(self.linear_1(self.feed_forward_norm(x))))
