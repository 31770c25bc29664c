"""DC-AE's forward as layers: images to a latent, and a latent to images, one layer for each resolution.

Slots: images (B, 3, S, S) in [0, 1]; tokenizer_latent, decoder_input (B, C, h, w), not scaled; decoder_hidden
(B, C', h', w'); reconstruction (B, 3, S, S), fp32, about [0, 1] and not clamped. The last layer brings the
reconstruction to the size of its target, so that a loss compares equal shapes.
"""

from __future__ import annotations

from diffusers.models.autoencoders.autoencoder_dc import Decoder
from torch import Tensor, nn

from parallel.program import Layer
from spar_scale.models.dc_ae.model import decoder_in, decoder_out, encode_images, resize, to_images


class EncodePixels(Layer):
    """Images to a latent; they are resized to `side` pixels first, where that is given."""

    def __init__(self, encoder: nn.Module, side: int | None, reads: str, writes: str, frozen: bool):
        super().__init__()
        self.encoder, self.side, self.reads, self.writes = encoder, side, (reads,), (writes,)
        self.detached = frozenset(self.writes if frozen else ())

    def forward(self, **slots: Tensor) -> dict[str, Tensor]:
        """Encode."""
        return {self.writes[0]: encode_images(self.encoder, slots[self.reads[0]], self.side)}


class DecoderBlock(Layer):
    """One up-block; the first also holds the stem, the last also the end.

    It maps `decoder_input` or `decoder_hidden` to `decoder_hidden`, the last one to `reconstruction`.
    """

    def __init__(self, decoder: Decoder, block: nn.Module, first: bool, last: bool, image_size: int):
        super().__init__()
        self.reads = ("decoder_input",) if first else ("decoder_hidden",)
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
    """Return the decoder as layers from `decoder_input` to `reconstruction` of `image_size` pixels."""
    if not decoder.in_shortcut:
        raise NotImplementedError("a decoder without the shortcut at its stem")
    blocks = [block for block in reversed(list(decoder.up_blocks)) if len(list(block.children()))]
    last = len(blocks) - 1
    return [DecoderBlock(decoder, block, i == 0, i == last, image_size) for i, block in enumerate(blocks)]
