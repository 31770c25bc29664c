"""SPAR's unified tokenizer: one vision tower, two streams, one latent, one pixel decoder.

    f_v = mlp1(shuffle(ViT(I)))            (B, N, D)   features, also the language model's input
    z_s = P_s(f_v)                         (B, N, C)   semantic stream
    z_p = P_p(T_p(f_v))                    (B, N, C)   pixel stream
    z_f = F([z_s, z_p])                    (B, N, C)   fused latent
    I'  = D_p(z_f as a (C, g, g) grid)     (B, 3, S, S)

N = g * g tokens in raster order. The ablation of the streams keeps one of them and takes its latent as
it is: z_f = z_s ("semantic") or z_f = z_p ("pixel"), without F, which has nothing to fuse; the weights of
what remains are those of the dual tokenizer of the same seed. Two frozen teachers stand beside it
while it trains: the pixel encoder E_p' of z_p, and the initial encoder of f_v. The whole of it runs in
one forward here; training runs the same modules as a list of layers (stages/tokenizer.py), and a test
holds the two bit-equal.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spar_scale.models.autoencoder import build_autoencoder, decode_latents, resize
from spar_scale.models.initialise import trunc_normal
from spar_scale.models.layers import Composition, LatentHead, ResBlock, TransformerLayer
from spar_scale.models.presets import Preset
from spar_scale.models.vision import build_vision, features

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

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, N, D) to z_p (B, N, C)."""
        for layer in self.layers:
            features = layer(features)
        return self.head(self.blocks(features))


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


class InitialEncoder(nn.Module):
    """A vision tower and projector of their own, to stay as the tokenizer's were before they trained."""

    def __init__(self, preset: Preset):
        super().__init__()
        self.downsample_ratio = preset.vision.downsample_ratio
        self.vision_tower, self.projector = build_vision(preset)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] to features f_v' (B, N, D)."""
        return features(self.vision_tower, self.projector, images, self.downsample_ratio)


class UnifiedTokenizer(Composition):
    """The tokenizer of a preset; parameter names are the checkpoint's. Weights are uninitialised.

    `streams` decides which of `semantic_stream`, `pixel_stream` and `fusion` exist. `pixel_encoder` and
    `initial_encoder`, the two teachers, exist where asked for; neither is part of encoding or decoding.
    """

    semantic_stream: SemanticStream
    pixel_stream: PixelStream
    fusion: Fusion
    pixel_encoder: nn.Module
    initial_encoder: InitialEncoder

    def __init__(
        self, preset: Preset, streams: Streams = "dual", pixel_encoder: bool = True, initial_encoder: bool = False
    ):
        super().__init__()
        shape, channels = preset.streams, preset.autoencoder.latent_channels
        self.image_size, self.downsample_ratio = preset.image_size, preset.vision.downsample_ratio
        self.preset, self.streams = preset.name, streams
        self.vision_tower, self.projector = build_vision(preset)
        if streams != "pixel":
            self.semantic_stream = SemanticStream(shape.width, shape.residual_blocks, channels)
        if streams != "semantic":
            self.pixel_stream = PixelStream(
                shape.width, shape.pixel_layers, shape.pixel_heads, shape.residual_blocks, channels
            )
        if streams == "dual":
            self.fusion = Fusion(channels, shape.fusion_residual)
        autoencoder = build_autoencoder(preset)
        self.decoder = autoencoder.decoder
        if pixel_encoder:
            self.pixel_encoder = autoencoder.encoder
        if initial_encoder:
            self.initial_encoder = InitialEncoder(preset)

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] to the features f_v (B, N, D)."""
        return features(self.vision_tower, self.projector, images, self.downsample_ratio)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] to the latent z_f (B, C, g, g)."""
        tokens = self.features(images)
        if self.streams == "semantic":
            return to_grid(self.semantic_stream(tokens))
        if self.streams == "pixel":
            return to_grid(self.pixel_stream(tokens))
        return to_grid(self.fusion(self.semantic_stream(tokens), self.pixel_stream(tokens)))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, g, g) to images (B, 3, S, S), fp32, about [0, 1] and not clamped."""
        return resize(decode_latents(self.decoder, latents), self.image_size)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] through the latent and back, clamped to [0, 1]."""
        return self.decode(self.encode(images)).clamp(0, 1)


def to_grid(tokens: Tensor) -> Tensor:
    """Tokens (B, g * g, C) in raster order to a grid (B, C, g, g)."""
    side = round(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (side, side)).contiguous()
