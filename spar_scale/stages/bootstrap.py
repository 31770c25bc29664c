"""The layers of an autoencoder in training, its initial weights and its published layout."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC, ResBlock
from torch import Tensor, nn

from parallel.program import Layer
from spar_scale.models.autoencoder import encode_images, latent_scale
from spar_scale.objectives.reconstruction import gradient_difference, latent_power, mean_squared_error


class EncodePixels(Layer):
    """`images` (B, 3, S, S) to `latent` (B, C, S / f, S / f)."""

    reads = ("images",)
    writes = ("latent",)

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Encode."""
        return {"latent": encode_images(self.encoder, images)}


class LatentPower(Layer):
    """The term `latent_power` (B,) of `latent`."""

    reads = ("latent",)
    writes = ("latent_power",)

    def forward(self, latent: Tensor) -> dict[str, Tensor]:
        """Measure what the encoder wrote."""
        return {"latent_power": latent_power(latent)}


class ReconstructionLoss(Layer):
    """The terms `mean_squared_error` (B,) and `gradient_difference` (B,) of `reconstruction` and `images`."""

    reads = ("reconstruction", "images")
    writes = ("mean_squared_error", "gradient_difference")

    def forward(self, reconstruction: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Compare with the images that went in."""
        return {
            "mean_squared_error": mean_squared_error(reconstruction, images),
            "gradient_difference": gradient_difference(reconstruction, images),
        }


def begin_with_shortcuts(model: nn.Module) -> None:
    """Start each residual branch, which ends in a norm, at zero.

    A branch of size one from the first step on fills every direction of the latent with what the seed drew;
    a diffusion transformer then learns slower.
    """
    for module in model.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(cast(Tensor, module.norm.weight))


def save_autoencoder(model: nn.Module, directory: Path, images: Tensor | None = None) -> None:
    """Write an AutoencoderDC in diffusers' published layout (config.json, safetensors).

    Its scaling factor becomes the inverse of the latents' deviation over images (n, 3, S, S), where given.
    """
    if not isinstance(model, AutoencoderDC):
        raise TypeError(f"expected AutoencoderDC, got {type(model).__name__}")
    if images is not None:
        model.register_to_config(scaling_factor=latent_scale(lambda part: encode_images(model.encoder, part), images))
    model.save_pretrained(str(directory), safe_serialization=True)
