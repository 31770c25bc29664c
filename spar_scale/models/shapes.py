"""What a preset is made of: the shapes of the parts, and the rules by which they fit together.

A preset that breaks one of `_RULES` cannot be constructed, so a wrong number is named where it stands
and not by a shape mismatch in the middle of a forward.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class VisionShape:
    """InternVL's vision tower; tokens on a side = image_size / patch_size * downsample_ratio."""

    image_size: int  # pixels
    patch_size: int  # pixels
    width: int
    layers: int
    heads: int
    mlp_width: int
    downsample_ratio: float  # of the pixel shuffle before the projector
    attention_bias: bool = True
    layer_scale: float = 0.1

    @property
    def grid(self) -> int:
        """Tokens on a side after the pixel shuffle."""
        return int(self.image_size // self.patch_size * self.downsample_ratio)

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return self.grid**2

    @property
    def pixels_per_token(self) -> float:
        """Pixels on a side of a token."""
        return self.patch_size / self.downsample_ratio


@dataclass(frozen=True)
class AutoencoderShape:
    """diffusers AutoencoderDC; the encoder and the decoder share channels, not depths.

    The spatial compression is 2 ** (len(channels) - 1). A first depth of 0 puts the stem's own
    down-sampling in place of a stage at full resolution.
    """

    latent_channels: int
    channels: tuple[int, ...]
    encoder_layers: tuple[int, ...]
    decoder_layers: tuple[int, ...]
    encoder_blocks: tuple[str, ...]
    decoder_blocks: tuple[str, ...]
    multiscales: tuple[tuple[int, ...], ...]
    downsample: str = "pixel_unshuffle"
    upsample: str = "pixel_shuffle"
    attention_head_dim: int = 32
    scaling_factor: float = 1.0

    @property
    def compression(self) -> int:
        """Pixels on a side per latent position."""
        return 2 ** (len(self.channels) - 1)

    def config(self) -> dict[str, object]:
        """Return the keyword arguments of AutoencoderDC. No batch statistics: every norm is RMS."""
        return {
            "in_channels": 3,
            "latent_channels": self.latent_channels,
            "attention_head_dim": self.attention_head_dim,
            "encoder_block_types": self.encoder_blocks,
            "decoder_block_types": self.decoder_blocks,
            "encoder_block_out_channels": self.channels,
            "decoder_block_out_channels": self.channels,
            "encoder_layers_per_block": self.encoder_layers,
            "decoder_layers_per_block": self.decoder_layers,
            "encoder_qkv_multiscales": self.multiscales,
            "decoder_qkv_multiscales": self.multiscales,
            "upsample_block_type": self.upsample,
            "downsample_block_type": self.downsample,
            "decoder_norm_types": "rms_norm",
            "decoder_act_fns": "silu",
            "scaling_factor": self.scaling_factor,
        }


@dataclass(frozen=True)
class StreamShape:
    """The streams and the fusion (SPAR, section on the dual-stream tokenizer).

    `fusion_residual` adds the pixel latent to the fusion's output and starts the fusion's last layer
    at zero, so that z_f = z_p exactly at the first step. The published tokenizer has no such path.
    """

    width: int  # D_s, the width of the language model that the projector maps to
    residual_blocks: int  # in each stream
    pixel_layers: int
    pixel_heads: int
    fusion_residual: bool = False


@dataclass(frozen=True)
class LanguageShape:
    """The Qwen2 language model; its width is the streams'. `image_token_id` is replaced by an image feature."""

    layers: int
    heads: int
    key_value_heads: int
    mlp_width: int
    vocab_size: int  # at least the tokenizer's words
    image_token_id: int
    max_positions: int
    rope_theta: float = 1e6
    rope_factor: float | None = None  # dynamic scaling of sequences longer than max_positions, None for none
    initializer_range: float = 0.02  # deviation of linear weights before training
    word_range: float = 0.02  # deviation of word embeddings before training


@dataclass(frozen=True)
class DiffusionShape:
    """Shape of a SANA diffusion transformer and of its alignment head.

    `interpolation_scale` spaces sin-cos positions; None is the published model, whose only positions
    come from the padding of its depthwise convolutions. On 4 x 4 latents that one drew shapes well and
    ignored places: 0.16 of placed objects right, 0.34 with positions at scale 1 (AdamW, equal budget),
    0.84 at scale 0.2 with open gates and Muon. `gate_offset` is added to the gates, which start near
    zero, so that the residual branches are open; `zero_output` starts the velocity at zero. Both act on
    a first training alone: weights loaded from disk replace them.
    """

    latent_channels: int
    sample_size: int  # latent positions on a side
    layers: int
    heads: int
    head_width: int
    cross_heads: int
    cross_head_width: int
    caption_channels: int
    align_hidden: int
    mlp_ratio: float = 2.5
    patch_size: int = 1
    interpolation_scale: float | None = None
    gate_offset: float = 0.0
    zero_output: bool = False

    @property
    def width(self) -> int:
        """Width of a token."""
        return self.heads * self.head_width

    @property
    def hidden(self) -> int:
        """Width inside a feed-forward, of a half of its gated unit."""
        return int(self.mlp_ratio * self.width)

    @property
    def cross_width(self) -> int:
        """Width of all heads of cross-attention."""
        return self.cross_heads * self.cross_head_width

    def config(self) -> dict[str, Any]:
        """Return the keyword arguments of SanaTransformer2DModel."""
        return {
            "in_channels": self.latent_channels,
            "out_channels": self.latent_channels,
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head_width,
            "num_layers": self.layers,
            "num_cross_attention_heads": self.cross_heads,
            "cross_attention_head_dim": self.cross_head_width,
            "cross_attention_dim": self.width,
            "caption_channels": self.caption_channels,
            "mlp_ratio": self.mlp_ratio,
            "sample_size": self.sample_size,
            "patch_size": self.patch_size,
            "interpolation_scale": self.interpolation_scale,
        }


@dataclass(frozen=True)
class ConditioningShape:
    """Between the language model and the diffusion transformer: queries, routing, connector."""

    num_queries: int  # one for each position of the latent grid
    sampled_states: int  # K, the hidden states that a token chooses among
    connector_layers: int
    max_words: int  # tokens of a prompt without its picture; longer samples are bad ones
    temperature: float = 1.0  # tau of the routing weights
    connector_copies: bool = True  # start from the language model's last layers, as published; else from the seed


@dataclass(frozen=True)
class SamplingShape:
    """How pictures are drawn unless a user says otherwise."""

    steps: int
    guidance: float
    flow_shift: float  # of the sampler's time steps; training has its own, objective.timestep_shift


@dataclass(frozen=True)
class Preset:
    """One named family of shapes. Raises ValueError, naming the field, for shapes that cannot work together."""

    name: str
    image_size: int  # pixels
    vision: VisionShape
    autoencoder: AutoencoderShape
    streams: StreamShape
    language: LanguageShape
    conditioning: ConditioningShape
    diffusion: DiffusionShape
    sampling: SamplingShape

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of a latent."""
        return self.autoencoder.latent_channels, self.vision.grid, self.vision.grid

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt, its picture between `<img>` and `</img>`, and the queries."""
        return self.conditioning.max_words + self.vision.tokens + 2 + self.conditioning.num_queries

    def __post_init__(self) -> None:
        for number, relation, whole in _RULES:
            found, wanted = operator.attrgetter(number, whole)(self)
            if not _HOLDS[relation](found, wanted):
                raise ValueError(f"preset '{self.name}': {number} = {found} must {relation} {whole} = {wanted}")


_HOLDS: dict[str, Callable[[float, float], bool]] = {
    "equal": operator.eq,
    "divide": lambda number, whole: number > 0 and whole % number == 0,
    "be at most": operator.le,
    "be below": operator.lt,
}
_RULES = (
    ("vision.image_size", "equal", "image_size"),
    ("vision.pixels_per_token", "divide", "vision.image_size"),
    ("vision.heads", "divide", "vision.width"),
    ("streams.pixel_heads", "divide", "streams.width"),
    ("language.heads", "divide", "streams.width"),
    ("language.key_value_heads", "divide", "language.heads"),
    ("language.image_token_id", "be below", "language.vocab_size"),
    ("conditioning.num_queries", "equal", "vision.tokens"),
    ("conditioning.sampled_states", "be at most", "language.layers"),
    ("conditioning.connector_layers", "be at most", "language.layers"),
    ("longest_sequence", "be at most", "language.max_positions"),
    ("diffusion.latent_channels", "equal", "autoencoder.latent_channels"),
    ("diffusion.sample_size", "equal", "vision.grid"),
    ("diffusion.patch_size", "divide", "diffusion.sample_size"),
    ("diffusion.cross_width", "equal", "diffusion.width"),
)
