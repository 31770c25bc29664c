"""DC-AE, SANA's pixel autoencoder. What other code uses of it is here."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from diffusers.models.autoencoders.autoencoder_dc import Decoder
from torch import nn

from parallel.program import Layer
from parallel.tensor import Plan
from spar_scale.models.dc_ae import layers, model, sharding, weights
from spar_scale.models.dc_ae.shapes import AutoencoderShape
from spar_scale.models.published import PretrainedPart


class Autoencoder(AutoencoderShape):
    """A pixel autoencoder with parts `encoder` and `decoder` (role `Autoencoder`)."""

    @property
    def plan(self) -> Plan:
        """How it is cut over tensor-parallel ranks."""
        return sharding.PLAN

    @property
    def tensor_sizes(self) -> dict[str, int]:
        """The sizes that a tensor-parallel size must divide: none."""
        return {}

    def build(self) -> nn.Module:
        """Return the model, weights uninitialised."""
        return model.build_autoencoder(self)

    def begin(self, autoencoder: nn.Module) -> None:
        """Change initial weights for a training from the seed."""
        model.begin_with_shortcuts(autoencoder)

    def load(self, part: PretrainedPart) -> tuple[nn.Module, float]:
        """Return the model with pretrained weights in the part's precision, and the scale of its latents."""
        return weights.load_autoencoder(part, self)

    def save(self, autoencoder: nn.Module, directory: Path, scale: float | None = None) -> None:
        """Write the published layout, with the scale of its latents where given."""
        weights.save_autoencoder(autoencoder, directory, scale)

    def encoding_layer(
        self,
        encoder: nn.Module,
        frozen: bool,
        side: int | None = None,
        reads: str = "images",
        writes: str = "tokenizer_latent",
    ) -> Layer:
        """Return the way from images, resized to `side` pixels where given, to latents."""
        return layers.EncodePixels(encoder, side, reads, writes, frozen)

    def reconstruction_layers(self, decoder: nn.Module, image_size: int) -> list[Layer]:
        """Return the way from `decoder_input` to `reconstruction` of `image_size` pixels."""
        return layers.decoder_layers(cast(Decoder, decoder), image_size)
