"""The shape of a SANA diffusion transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DiffusionShape:
    """Shape of a SANA diffusion transformer and of its alignment head.

    `interpolation_scale` spaces sin-cos positions; None is the published model, whose only positions
    come from the padding of its depthwise convolutions. On 4 x 4 latents that one drew shapes well and
    ignored places: 0.16 of placed objects right, 0.34 with positions at scale 1 (AdamW, equal budget),
    0.84 at scale 0.2 with open gates and Muon. `gate_offset` is added to the gates, which start near
    zero, so that the residual branches are open; `zero_output` starts the velocity at zero. Both act on
    a first training alone: weights loaded from disk replace them.
    """

    latent_channels: int
    sample_size: int  # latent positions on a side
    layers: int
    heads: int
    head_width: int
    cross_heads: int
    cross_head_width: int
    caption_channels: int
    align_hidden: int
    mlp_ratio: float = 2.5
    patch_size: int = 1
    interpolation_scale: float | None = None
    gate_offset: float = 0.0
    zero_output: bool = False

    @property
    def width(self) -> int:
        """Width of a token."""
        return self.heads * self.head_width

    @property
    def hidden(self) -> int:
        """Width inside a feed-forward, of a half of its gated unit."""
        return int(self.mlp_ratio * self.width)

    @property
    def cross_width(self) -> int:
        """Width of all heads of cross-attention."""
        return self.cross_heads * self.cross_head_width

    def config(self) -> dict[str, Any]:
        """Return the keyword arguments of SanaTransformer2DModel."""
        return {
            "in_channels": self.latent_channels,
            "out_channels": self.latent_channels,
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head_width,
            "num_layers": self.layers,
            "num_cross_attention_heads": self.cross_heads,
            "cross_attention_head_dim": self.cross_head_width,
            "cross_attention_dim": self.width,
            "caption_channels": self.caption_channels,
            "mlp_ratio": self.mlp_ratio,
            "sample_size": self.sample_size,
            "patch_size": self.patch_size,
            "interpolation_scale": self.interpolation_scale,
        }
