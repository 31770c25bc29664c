"""The pixel autoencoder: diffusers AutoencoderDC between images in [0, 1] and latents.

Shapes: images (B, 3, S, S) in [0, 1], latents (B, C, S / f, S / f). The published class works on
[-1, 1]; the two maps here are the only place where that is known. The list of layers (`layers.py`) composes the
decoder of `decoder_in`, the up-blocks and `decoder_out`; a test holds it bit-equal to the class's own forward.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC, ResBlock
from torch import Tensor, nn

from spar_scale.models.dc_ae.shapes import AutoencoderShape


def build_autoencoder(shape: AutoencoderShape) -> AutoencoderDC:
    """Return a pixel autoencoder, weights uninitialised."""
    return AutoencoderDC(**shape.config())  # pyright: ignore[reportArgumentType]


def dtype_of(module: nn.Module):
    """Return the dtype of a module's parameters."""
    return next(module.parameters()).dtype


def encode_images(encoder: nn.Module, images: Tensor, side: int | None = None) -> Tensor:
    """Images (B, 3, S, S) in [0, 1] to latents; resized to `side` pixels first where that differs."""
    return encoder((resize(images, side or images.shape[-1]) * 2 - 1).to(dtype_of(encoder)))


def to_images(decoded: Tensor) -> Tensor:
    """The decoder's output in [-1, 1] to images in [0, 1], fp32, not clamped."""
    return (decoded.float() + 1) / 2


def resize(images: Tensor, side: int) -> Tensor:
    """Bilinear resize (B, 3, S, S) to `side` pixels; the same tensor where nothing changes."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)


def decoder_in(conv_in: nn.Module, repeats: int, latents: Tensor) -> Tensor:
    """The decoder's stem: convolution plus the latents repeated over channels (DC-AE shortcut)."""
    latents = latents.to(dtype_of(conv_in))
    return conv_in(latents) + latents.repeat_interleave(repeats, dim=1)


def decoder_out(norm: nn.Module, activation: nn.Module, conv_out: nn.Module, hidden: Tensor) -> Tensor:
    """The decoder's end: RMS norm over channels, activation, convolution to 3 channels in [-1, 1]."""
    return conv_out(activation(norm(hidden.movedim(1, -1)).movedim(-1, 1)))


def begin_with_shortcuts(model: nn.Module) -> None:
    """Start each residual branch, which ends in a norm, at zero.

    A branch of size one from the first step on fills every direction of the latent with what the seed drew;
    a diffusion transformer then learns slower.
    """
    for module in model.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(cast(Tensor, module.norm.weight))
