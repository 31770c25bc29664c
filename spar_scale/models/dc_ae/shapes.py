"""The shape of a pixel autoencoder."""

from __future__ import annotations

from dataclasses import dataclass


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
