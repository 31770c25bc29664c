"""SPAR's unified tokenizer: one vision tower, two streams, one latent, one pixel decoder.

    f_v = mlp1(shuffle(ViT(I)))            (B, N, D)   features, also the language model's input
    z_s = P_s(f_v)                         (B, N, C)   semantic stream
    z_p = P_p(T_p(f_v))                    (B, N, C)   pixel stream
    z_f = F([z_s, z_p])                    (B, N, C)   fused latent
    I'  = D_p(z_f as a (C, g, g) grid)     (B, 3, S, S)

N = g * g tokens in raster order. The ablation of the streams keeps one of them and takes its latent as
it is: z_f = z_s ("semantic") or z_f = z_p ("pixel"), without F, which has nothing to fuse; the weights of
what remains are those of the dual tokenizer of the same seed. Two frozen teachers stand beside it
while it trains: the pixel encoder E_p' of z_p, and the initial encoder of f_v. The list of layers (`layers.py`) is
the forward.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spar_scale.models.blocks import Composition, LatentHead, ResBlock, TransformerLayer
from spar_scale.models.dual_stream.shapes import StreamShape
from spar_scale.models.initialise import trunc_normal
from spar_scale.models.roles import Autoencoder, VisionEncoder

Streams = Literal["dual", "semantic", "pixel"]


class SemanticStream(nn.Module):
    """P_s: residual blocks and a latent head on the features."""

    _init_weights = staticmethod(trunc_normal)

    def __init__(self, width: int, blocks: int, channels: int):
        super().__init__()
        self.blocks = nn.Sequential(*(ResBlock(width) for _ in range(blocks)))
        self.head = LatentHead(width, channels)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, N, D) to z_s (B, N, C)."""
        return self.head(self.blocks(features))


class PixelStream(nn.Module):
    """T_p then P_p: Transformer layers without positions or final norm, residual blocks, latent head."""

    _init_weights = staticmethod(trunc_normal)

    def __init__(self, width: int, layers: int, heads: int, blocks: int, channels: int):
        super().__init__()
        self.layers = nn.ModuleList(TransformerLayer(width, heads) for _ in range(layers))
        self.blocks = nn.Sequential(*(ResBlock(width) for _ in range(blocks)))
        self.head = LatentHead(width, channels)


class Fusion(nn.Module):
    """F: LN(2C) -> Linear(2C, 2C) -> GELU -> Linear(2C, C) on [z_s, z_p].

    With `residual` the pixel latent is added and the last layer starts at zero: z_f = z_p at first, so
    that the frozen decoder sees latents of its own kind from the moment z_p matches its teacher.
    """

    def __init__(self, channels: int, residual: bool):
        super().__init__()
        self.residual = residual
        self.norm = nn.LayerNorm(2 * channels, eps=1e-6)
        self.linear_1 = nn.Linear(2 * channels, 2 * channels)
        self.linear_2 = nn.Linear(2 * channels, channels)

    def forward(self, semantic: Tensor, pixel: Tensor) -> Tensor:
        """Map z_s and z_p, each (B, N, C), to z_f (B, N, C)."""
        fused = self.linear_2(F.gelu(self.linear_1(self.norm(torch.cat([semantic, pixel], dim=-1)))))
        return pixel + fused if self.residual else fused

    def _init_weights(self, module: nn.Module) -> None:
        trunc_normal(module)
        if self.residual and module is self.linear_2:
            nn.init.zeros_(self.linear_2.weight)


class UnifiedTokenizer(Composition):
    """The tokenizer; parameter names are the checkpoint's. Weights are uninitialised.

    `streams` decides which of `semantic_stream`, `pixel_stream` and `fusion` exist. `pixel_encoder` and
    `initial_encoder`, the two teachers, exist where asked for; neither is part of encoding or decoding.
    """

    vision_tower: nn.Module
    projector: nn.Module
    semantic_stream: SemanticStream
    pixel_stream: PixelStream
    fusion: Fusion
    decoder: nn.Module
    pixel_encoder: nn.Module
    initial_encoder: nn.Module

    def __init__(
        self,
        shape: StreamShape,
        vision: VisionEncoder,
        autoencoder: Autoencoder,
        streams: Streams = "dual",
        pixel_encoder: bool = True,
        initial_encoder: bool = False,
    ):
        super().__init__()
        width, channels = vision.output_width, autoencoder.latent_channels
        self.streams: Streams = streams
        encoder = vision.build()
        self.vision_tower, self.projector = encoder.get_submodule("vision_tower"), encoder.get_submodule("projector")
        if streams != "pixel":
            self.semantic_stream = SemanticStream(width, shape.residual_blocks, channels)
        if streams != "semantic":
            self.pixel_stream = PixelStream(
                width, shape.pixel_layers, shape.pixel_heads, shape.residual_blocks, channels
            )
        if streams == "dual":
            self.fusion = Fusion(channels, shape.fusion_residual)
        pixels = autoencoder.build()
        self.decoder = pixels.get_submodule("decoder")
        if pixel_encoder:
            self.pixel_encoder = pixels.get_submodule("encoder")
        if initial_encoder:
            self.initial_encoder = vision.build()


def to_grid(tokens: Tensor) -> Tensor:
    """Tokens (B, g * g, C) in raster order to a grid (B, C, g, g)."""
    side = round(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (side, side)).contiguous()
