"""The shape of the dual-stream tokenizer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StreamShape:
    """The streams and the fusion (SPAR, section on the dual-stream tokenizer).

    `fusion_residual` adds the pixel latent to the fusion's output and starts the fusion's last layer
    at zero, so that z_f = z_p exactly at the first step. The published tokenizer has no such path.
    """

    residual_blocks: int  # in each stream
    pixel_layers: int
    pixel_heads: int
    fusion_residual: bool = False
