"""A diffusion transformer with a text encoder of its own (word and position embeddings, one layer).

The text encoder is not published.

Two other text encoders were worse:
- the last hidden states of the frozen language model, at a time when its word embeddings were nearly alike at the
  start: the transformer hardly reacted to positions;
- layers of the connector drew a fifth fewer of the prompts correctly after the same number of steps. Under Muon
  their gated feed-forward outputs grow until they hide the word embeddings, and with one of two seeds half of the
  placed objects were wrong.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from parallel.program import Layer
from spar_scale.models.blocks import Composition, TransformerLayer
from spar_scale.models.dual_stream import DualStream
from spar_scale.models.presets import Preset
from spar_scale.ops.packing import Packing, cumulative, position_ids


class TextEncoder(nn.Module):
    """Words and their places, and one bidirectional layer: tokens (T,) of all samples to captions (T, C).

    Words start far apart, so that those of one kind (left, right) stay apart in what the transformer reads.
    """

    def __init__(self, preset: Preset):
        super().__init__()
        channels = preset.diffusion.caption_channels
        self.words = nn.Embedding(preset.language.vocab_size, channels)
        self.places = nn.Embedding(preset.language.max_positions, channels)
        self.layer = TransformerLayer(channels, cast(DualStream, preset.tokenizer).pixel_heads)
        self.longest = preset.longest_sequence

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Encode tokens (T,) of samples of these lengths (B,)."""
        packing = Packing.same(cumulative(lengths), self.longest)
        return self.layer(self.words(tokens) + self.places(position_ids(lengths, len(tokens))), packing)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5 if module is self.words else 0.3)
        else:
            cast(Any, module).reset_parameters()


class CaptionedDiffusion(Composition):
    """A diffusion transformer, the frozen autoencoder that it is trained with, and its text encoder."""

    def __init__(self, preset: Preset, tokenizer: nn.Module):
        super().__init__()
        self.tokenizer = tokenizer
        self.text_encoder = TextEncoder(preset)
        self.diffusion = preset.diffusion.build()


class EncodeText(Layer):
    """`tokens` (T,) to `captions` (T, C), and `lengths` (B,) to `caption_bounds` (B + 1,)."""

    reads = ("tokens", "lengths")
    writes = ("captions", "caption_bounds")

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Encode."""
        return {"captions": self.encoder(tokens, lengths), "caption_bounds": cumulative(lengths)}
