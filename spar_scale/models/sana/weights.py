"""SANA's published layout, that of diffusers: config.json and safetensors, read strictly and written."""

from __future__ import annotations

from pathlib import Path

from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel
from torch import nn

from spar_scale.models.published import PretrainedPart, copy_weights, shapes_only
from spar_scale.models.sana.model import Diffusion
from spar_scale.models.sana.shapes import DiffusionShape


def load_diffusion(part: PretrainedPart, shape: DiffusionShape) -> Diffusion:
    """Load a diffusion transformer, fp32, checked against the shape."""
    diffusion = Diffusion(shape)
    if not shapes_only():
        part.check(part.config(), shape.config())
        copy_weights(diffusion.transformer, part.read(SanaTransformer2DModel, low_cpu_mem_usage=False))
    return diffusion


def save_diffusion(diffusion: nn.Module, directory: Path) -> None:
    """Write a diffusion transformer. Raises TypeError for another model."""
    if not isinstance(diffusion, Diffusion):
        raise TypeError(f"expected Diffusion, got {type(diffusion).__name__}")
    diffusion.transformer.save_pretrained(str(directory), safe_serialization=True)
