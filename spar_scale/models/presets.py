"""Named shapes of the models.

Every number that decides a parameter's shape stands here and nowhere else, so two runs that name the
same preset have interchangeable weights. The tiny preset divides by tensor 2 and pipeline 2 (even
heads, at least four layers where layers are cut). Its autoencoder costs about 0.2 core-seconds per
step of 64 images. Its vision tower takes patches of 4 pixels folded 2 x 2 by the pixel shuffle, not 8
pixels unfolded: both give 16 tokens; with a frozen random tower the first reached 28.1 dB and the
second 27.5 dB after 200 steps of the tokenizer's first phase (0.52 and 0.42 core-seconds a step), and
only the first uses the shuffle that the published tower needs.
"""

from __future__ import annotations

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
    """From the language model to the diffusion transformer: queries, routing, connector (SPAR, section on conditioning)."""

    num_queries: int  # one for each position of the latent grid
    sampled_states: int  # K, the hidden states that a token chooses among
    connector_layers: int
    max_words: int  # tokens of a prompt without its picture; longer samples are bad ones
    temperature: float = 1.0  # tau of the routing weights


@dataclass(frozen=True)
class SamplingShape:
    """How pictures are drawn unless a user says otherwise."""

    steps: int
    guidance: float
    flow_shift: float  # of the sampler's time steps; training has none


@dataclass(frozen=True)
class Preset:
    """One named family of shapes."""

    name: str
    image_size: int  # pixels
    vision: VisionShape
    autoencoder: AutoencoderShape
    streams: StreamShape
    language: LanguageShape
    conditioning: ConditioningShape
    diffusion: DiffusionShape
    sampling: SamplingShape


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="tiny",
            image_size=32,
            vision=VisionShape(
                image_size=32, patch_size=4, width=128, layers=4, heads=4, mlp_width=512, downsample_ratio=0.5
            ),
            autoencoder=AutoencoderShape(
                latent_channels=32,
                channels=(16, 32, 64, 128),
                encoder_layers=(0, 1, 1, 1),
                decoder_layers=(0, 1, 1, 1),
                encoder_blocks=("ResBlock",) * 4,
                decoder_blocks=("ResBlock",) * 4,
                multiscales=((),) * 4,
            ),
            streams=StreamShape(width=128, residual_blocks=3, pixel_layers=6, pixel_heads=4, fusion_residual=True),
            language=LanguageShape(
                layers=8,
                heads=4,
                key_value_heads=2,
                mlp_width=512,
                vocab_size=64,
                image_token_id=61,
                max_positions=128,
                rope_theta=1e4,
            ),
            conditioning=ConditioningShape(num_queries=16, sampled_states=4, connector_layers=2, max_words=14),
            diffusion=DiffusionShape(
                latent_channels=32,
                sample_size=4,
                layers=6,
                heads=6,
                head_width=32,
                cross_heads=6,
                cross_head_width=32,
                caption_channels=128,
                align_hidden=192,
                interpolation_scale=0.2,
                gate_offset=0.5,
                zero_output=True,
            ),
            sampling=SamplingShape(steps=16, guidance=2.5, flow_shift=1.0),
        ),
    )
}
