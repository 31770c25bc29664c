"""DC-AE's published layout, that of diffusers: config.json and safetensors, read strictly and written."""

from __future__ import annotations

import inspect
from pathlib import Path

from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from torch import nn

from spar_scale.models.dc_ae.model import build_autoencoder
from spar_scale.models.dc_ae.shapes import AutoencoderShape
from spar_scale.models.published import PretrainedPart, parameters_on_meta

KIND, FILES = "AutoencoderDC", "diffusion_pytorch_model"
_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(AutoencoderDC.__init__).parameters.items()
    if name != "self"
}


def load_autoencoder(part: PretrainedPart, shape: AutoencoderShape) -> tuple[AutoencoderDC, float]:
    """Load an autoencoder in the part's precision, checked against the shape; return it and its scaling factor.

    The factor must be that of the shape where this has one, because a published diffusion transformer was trained with
    it; else it is what was measured when the autoencoder was trained.
    """
    scale = shape.scaling_factor
    if part.is_checked:
        found = part.config()
        part.check_kind(found, "_class_name", KIND, "the repository dc-ae-f32c32-sana-1.1-diffusers, or a run's")
        if found.get("downsample_block_type") == "conv":  # as diffusers' converter spells it; the model is the same
            found["downsample_block_type"] = "Conv"
        scale = part.positive(_DEFAULTS | found, "scaling_factor")
        expected = _DEFAULTS | shape.config()
        if shape.scaling_factor == _DEFAULTS["scaling_factor"]:
            del expected["scaling_factor"]
        part.check(found, expected, _DEFAULTS)
    with parameters_on_meta():
        model = build_autoencoder(shape)
    part.fill(model, FILES)
    return model.eval(), scale


def save_autoencoder(model: nn.Module, directory: Path, scale: float | None = None) -> None:
    """Write an autoencoder, with the scale of its latents where given. Raises TypeError for another model."""
    if not isinstance(model, AutoencoderDC):
        raise TypeError(f"expected AutoencoderDC, got {type(model).__name__}")
    if scale is not None:
        model.register_to_config(scaling_factor=scale)
    model.save_pretrained(str(directory), safe_serialization=True)
