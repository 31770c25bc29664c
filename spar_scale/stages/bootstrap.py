"""Stage 0, for the miniature only: train the small parts that the paper takes as pretrained.

Phase `autoencoder`: AutoencoderDC on reconstruction. The latent carries noise of a fixed size, drawn
with the sample, so that neighbouring latents decode alike (a diffusion model will draw there later);
a penalty above unit power keeps the encoder from outgrowing the noise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC, ResBlock
from torch import Tensor, nn

from parallel.program import Layer
from spar_scale.data.spec import Draw, SampleSpec
from spar_scale.models.autoencoder import build_autoencoder, encode_images, latent_scale
from spar_scale.models.initialise import initialise
from spar_scale.objectives.reconstruction import gradient_difference, latent_power, mean_squared_error
from spar_scale.stages import Export, Stage
from spar_scale.stages.parts import preset_of, pretrained_directories
from spar_scale.stages.pixel_decoder import PerturbLatent, decoder_layers


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


def autoencoder(recipe: Any) -> Stage:
    """Build stage `bootstrap`, phase `autoencoder`.

    Reads from the recipe: model.preset, seed, objective.{perceptual_weight, latent_noise,
    latent_power_weight}. Exports the published layout of AutoencoderDC.
    """
    pretrained_directories(recipe, allowed=(), required=())
    preset, objective = preset_of(recipe), recipe.objective
    model = build_autoencoder(preset)
    initialise(model, recipe.seed)
    _begin_with_shortcuts(model)
    side = preset.image_size // preset.autoencoder.compression
    return Stage(
        model=model,
        layers=[
            EncodePixels(model.encoder),
            LatentPower(),
            PerturbLatent(objective.latent_noise),
            *decoder_layers(model.decoder, preset.image_size),
            ReconstructionLoss(),
        ],
        inputs=("images", "latent_noise"),
        terms={
            "mean_squared_error": 1.0,
            "gradient_difference": objective.perceptual_weight,
            "latent_power": objective.latent_power_weight,
        },
        groups={"main": ("encoder", "decoder")},
        sample=SampleSpec(
            task="images",
            image_size=preset.image_size,
            draws={"latent_noise": Draw((preset.autoencoder.latent_channels, side, side), "normal")},
        ),
        export=Export(save_autoencoder, calibrated=True),
    )


def _begin_with_shortcuts(model: nn.Module) -> None:
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
