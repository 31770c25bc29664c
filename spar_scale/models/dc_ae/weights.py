"""DC-AE's published layout, that of diffusers: config.json and safetensors, read strictly and written."""

from __future__ import annotations

from pathlib import Path

from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from torch import nn

from spar_scale.models.dc_ae.model import build_autoencoder
from spar_scale.models.dc_ae.shapes import AutoencoderShape
from spar_scale.models.published import PretrainedPart, shapes_only


def load_autoencoder(part: PretrainedPart, shape: AutoencoderShape) -> tuple[AutoencoderDC, float]:
    """Load an autoencoder, fp32, checked against the shape; return it and its scaling factor."""
    if shapes_only():
        return build_autoencoder(shape), shape.scaling_factor
    expected = shape.config()
    del expected["scaling_factor"]  # no shape: what was measured when the autoencoder was trained
    found = part.config()
    part.check(found, expected)
    scale = part.positive(found, "scaling_factor")
    return part.read(AutoencoderDC, low_cpu_mem_usage=False), scale


def save_autoencoder(model: nn.Module, directory: Path, scale: float | None = None) -> None:
    """Write an autoencoder, with the scale of its latents where given. Raises TypeError for another model."""
    if not isinstance(model, AutoencoderDC):
        raise TypeError(f"expected AutoencoderDC, got {type(model).__name__}")
    if scale is not None:
        model.register_to_config(scaling_factor=scale)
    model.save_pretrained(str(directory), safe_serialization=True)
