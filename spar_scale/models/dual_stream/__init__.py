"""SPAR's dual-stream tokenizer, and its discriminator. What other code uses of them is here."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from torch import nn

from parallel.program import Layer
from parallel.tensor import Plan
from spar_scale.models.dual_stream import discriminator, layers, model, sharding, weights
from spar_scale.models.dual_stream.model import Streams, to_grid
from spar_scale.models.dual_stream.shapes import StreamShape
from spar_scale.models.published import PretrainedPart
from spar_scale.models.roles import Autoencoder, VisionEncoder

__all__ = ["DualStream", "Streams", "build_discriminator", "to_grid"]


class DualStream(StreamShape):
    """A dual-stream tokenizer (role `ImageTokenizer`)."""

    @property
    def plan(self) -> Plan:
        """How it is cut over tensor-parallel ranks, beside the shared blocks."""
        return sharding.PLAN

    @property
    def tensor_sizes(self) -> dict[str, int]:
        """The sizes that a tensor-parallel size must divide."""
        return {"pixel_heads": self.pixel_heads}

    def build(
        self,
        vision: VisionEncoder,
        autoencoder: Autoencoder,
        streams: Streams = "dual",
        pixel_encoder: bool = False,
        initial_encoder: bool = False,
    ) -> nn.Module:
        """Return the model, weights uninitialised, with the teachers that are asked for."""
        return model.UnifiedTokenizer(self, vision, autoencoder, streams, pixel_encoder, initial_encoder)

    def load(self, part: PretrainedPart, vision: VisionEncoder, autoencoder: Autoencoder) -> tuple[nn.Module, float]:
        """Return the model without teachers, with pretrained weights, and the scale of its latents."""
        return weights.load_tokenizer(part, self, vision, autoencoder)

    def save(self, tokenizer: nn.Module, directory: Path, preset: str, latent_scale: float, images: int) -> None:
        """Write the model without teachers; the scale of its latents was measured on a number of images."""
        weights.save_tokenizer(tokenizer, directory, preset, latent_scale, images)

    def latent_layers(self, tokenizer: nn.Module, features: str = "features") -> list[Layer]:
        """Return the way from a slot of features to `tokenizer_latent`."""
        return layers.latent_layers(cast(model.UnifiedTokenizer, tokenizer), features)


def build_discriminator(autoencoder: Autoencoder, image_size: int) -> nn.Module:
    """Return the discriminator of images (B, 3, S, S), weights uninitialised, as wide as the pixel autoencoder."""
    return discriminator.Discriminator(autoencoder.channels[0], image_size)
