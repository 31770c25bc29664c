"""SANA's published layout, that of diffusers: config.json and safetensors, read strictly and written."""

from __future__ import annotations

import inspect
from pathlib import Path

from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel
from torch import nn

from spar_scale.models.published import PretrainedPart, parameters_on_meta
from spar_scale.models.sana.model import Diffusion
from spar_scale.models.sana.shapes import DiffusionShape

KIND, FILES = "SanaTransformer2DModel", "diffusion_pytorch_model"
_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(SanaTransformer2DModel.__init__).parameters.items()
    if name not in ("self", "guidance_embeds_scale")  # of no effect without guidance_embeds
}


def load_diffusion(part: PretrainedPart, shape: DiffusionShape) -> Diffusion:
    """Load a diffusion transformer in the part's precision, checked against the shape."""
    if part.is_checked:
        found = part.config()
        part.check_kind(found, "_class_name", KIND, "the folder `transformer` of a repository Sana_..._diffusers")
        part.check(found, _DEFAULTS | shape.config(), _DEFAULTS)
    with parameters_on_meta():
        diffusion = Diffusion(shape)
    part.fill(diffusion.transformer, FILES)
    return diffusion


def save_diffusion(diffusion: nn.Module, directory: Path) -> None:
    """Write a diffusion transformer. Raises TypeError for another model."""
    if not isinstance(diffusion, Diffusion):
        raise TypeError(f"expected Diffusion, got {type(diffusion).__name__}")
    diffusion.transformer.save_pretrained(str(directory), safe_serialization=True)
