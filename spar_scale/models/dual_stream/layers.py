"""The streams and the fusion as layers: features to the latent.

Slots (B images, N = g * g tokens, D width, C latent channels):
    features f_v (B, N, D)   semantic_latent z_s (B, N, C)   pixel_hidden (B, N, D)   pixel_latent z_p (B, N, C)
    tokenizer_latent z_f (B, C, g, g), not scaled
"""

from __future__ import annotations

from torch import Tensor, nn

from parallel.program import Apply, Layer
from spar_scale.models.dual_stream.model import PixelStream, UnifiedTokenizer, to_grid


class PixelLatent(Layer):
    """`pixel_hidden` through the pixel stream's residual blocks and head to `pixel_latent`."""

    reads = ("pixel_hidden",)
    writes = ("pixel_latent",)

    def __init__(self, stream: PixelStream):
        super().__init__()
        self.blocks, self.head = stream.blocks, stream.head

    def forward(self, pixel_hidden: Tensor) -> dict[str, Tensor]:
        """Run the blocks and the head."""
        return {"pixel_latent": self.head(self.blocks(pixel_hidden))}


class FuseLatents(Layer):
    """`semantic_latent` and `pixel_latent` to `tokenizer_latent`."""

    reads = ("semantic_latent", "pixel_latent")
    writes = ("tokenizer_latent",)

    def __init__(self, fusion: nn.Module):
        super().__init__()
        self.fusion = fusion

    def forward(self, semantic_latent: Tensor, pixel_latent: Tensor) -> dict[str, Tensor]:
        """Fuse."""
        return {"tokenizer_latent": to_grid(self.fusion(semantic_latent, pixel_latent))}


def latent_layers(model: UnifiedTokenizer, features: str) -> list[Layer]:
    """Return the way from a slot of features to `tokenizer_latent`, over the streams that exist."""
    layers: list[Layer] = []
    if model.streams != "pixel":
        layers.append(Apply(model.semantic_stream, (features,), "semantic_latent"))
    if model.streams != "semantic":
        for number, layer in enumerate(model.pixel_stream.layers):
            layers.append(Apply(layer, ("pixel_hidden" if number else features,), "pixel_hidden"))
        layers.append(PixelLatent(model.pixel_stream))
    if model.streams == "dual":
        return [*layers, FuseLatents(model.fusion)]
    return [*layers, Apply(to_grid, (f"{model.streams}_latent",), "tokenizer_latent")]
