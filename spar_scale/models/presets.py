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
class Preset:
    """One named family of shapes."""

    name: str
    image_size: int  # pixels
    vision: VisionShape
    autoencoder: AutoencoderShape
    streams: StreamShape
    language: LanguageShape


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
        ),
    )
}
