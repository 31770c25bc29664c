"""The pixel decoder (AutoencoderDC's) as layers: one per block of one resolution; and the noise before it.

The last layer brings the image to the size of its target, so that a loss compares equal shapes.
"""

from __future__ import annotations

from diffusers.models.autoencoders.autoencoder_dc import Decoder
from torch import Tensor, nn

from parallel.program import Layer
from spar_scale.models.autoencoder import decoder_in, decoder_out, resize, to_images


class PerturbLatent(Layer):
    """`latent` + level * `latent_noise`: what the decoder reads while it trains."""

    reads = ("latent", "latent_noise")
    writes = ("latent",)

    def __init__(self, level: float):
        super().__init__()
        self.level = level

    def forward(self, latent: Tensor, latent_noise: Tensor) -> dict[str, Tensor]:
        """Add the noise that the sample carries."""
        return {"latent": latent + self.level * latent_noise.to(latent.dtype)}


class DecoderBlock(Layer):
    """One up-block; the first also holds the stem, the last also the end.

    Slots: `latent` (B, C, h, w) or `decoder_hidden` (B, C', h', w') to `decoder_hidden`, or, in the last,
    to `reconstruction` (B, 3, S, S), fp32, about [0, 1].
    """

    def __init__(self, decoder: Decoder, block: nn.Module, first: bool, last: bool, image_size: int):
        super().__init__()
        self.reads = ("latent",) if first else ("decoder_hidden",)
        self.writes = ("reconstruction",) if last else ("decoder_hidden",)
        self.block, self.image_size, self.last = block, image_size, last
        self.conv_in = decoder.conv_in if first else None
        self.repeats = decoder.in_shortcut_repeats if first else 0
        self.norm_out = decoder.norm_out if last else None
        self.conv_act = decoder.conv_act if last else None
        self.conv_out = decoder.conv_out if last else None

    def forward(self, **slots: Tensor) -> dict[str, Tensor]:
        """Run the block."""
        (hidden,) = slots.values()
        if self.conv_in is not None:
            hidden = decoder_in(self.conv_in, self.repeats, hidden)
        hidden = self.block(hidden)
        if self.norm_out is None or self.conv_act is None or self.conv_out is None:
            return {"decoder_hidden": hidden}
        decoded = decoder_out(self.norm_out, self.conv_act, self.conv_out, hidden)
        return {"reconstruction": resize(to_images(decoded), self.image_size)}


def decoder_layers(decoder: Decoder, image_size: int) -> list[Layer]:
    """Return the decoder as layers from `latent` to `reconstruction` of `image_size` pixels."""
    if not decoder.in_shortcut:
        raise NotImplementedError("a decoder without the shortcut at its stem")
    blocks = [block for block in reversed(list(decoder.up_blocks)) if len(list(block.children()))]
    last = len(blocks) - 1
    return [DecoderBlock(decoder, block, i == 0, i == last, image_size) for i, block in enumerate(blocks)]
