"""The pretrained parts of a preset with seeded weights, in the layouts that the stages write and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from parallel.program import Subprogram
from spar_scale.data.prompts import build_tokenizer
from spar_scale.models.initialise import initialise
from spar_scale.models.internvl import build_mllm, save_mllm
from spar_scale.models.presets import PRESETS, Preset
from spar_scale.phases import find
from spar_scale.training.calibration import latent_scale

TINY = PRESETS["tiny"]


def make_parts(folder: Path, preset: Preset = TINY) -> dict[str, str]:
    """Write all parts of a preset under `folder`; return part -> directory.

    The diffusion model's output is not zero.
    """
    generator = torch.Generator().manual_seed(11)
    tokenizer: Any = preset.tokenizer
    images = torch.rand(16, 3, preset.image_size, preset.image_size, generator=generator)
    directories = {name: folder / name for name in ("mllm", "pixel_autoencoder", "tokenizer", "diffusion")}
    models: dict[str, Any] = {
        "mllm": build_mllm(preset.vision, preset.language),
        "pixel_autoencoder": preset.autoencoder.build(),
        "tokenizer": tokenizer.build(preset.vision, preset.autoencoder),
        "diffusion": preset.diffusion.build(),
    }
    for seed, model in enumerate(models.values(), start=20):
        initialise(model, seed)
    with torch.no_grad():
        models["diffusion"].transformer.proj_out.weight.normal_(std=0.02, generator=generator)
        models["tokenizer"].fusion.linear_2.weight.normal_(std=0.02, generator=generator)
    save_mllm(models["mllm"], directories["mllm"])
    build_tokenizer().save_pretrained(str(directories["mllm"]))
    with torch.no_grad():
        scale = latent_scale(models["pixel_autoencoder"].encoder(images * 2 - 1))
    preset.autoencoder.save(models["pixel_autoencoder"], directories["pixel_autoencoder"], scale)
    scale = latent_scale(encode(models["tokenizer"], preset, images))
    tokenizer.save(models["tokenizer"], directories["tokenizer"], preset.name, scale, len(images))
    preset.diffusion.save(models["diffusion"], directories["diffusion"])
    return {name: str(directory) for name, directory in directories.items()}


@torch.no_grad()
def encode(tokenizer: torch.nn.Module, preset: Preset, images: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, S, S) to a tokenizer's latents (B, C, g, g)."""
    layers = [*preset.vision.feature_layers(tokenizer, frozen=True), *preset.tokenizer.latent_layers(tokenizer)]
    return Subprogram(layers, ("tokenizer_latent",))({"images": images})["tokenizer_latent"]


def parts_of(stage: str, phase: str, parts: dict[str, str]) -> dict[str, str]:
    """The parts that a phase requires."""
    declared = find(stage, phase)
    return {name: parts[name] for name in (() if declared is None else declared.requires)}
