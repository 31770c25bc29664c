"""The pretrained parts of a preset with seeded weights, in the layouts that the stages write and read."""

from __future__ import annotations

from pathlib import Path

import torch

from spar_scale.models.autoencoder import build_autoencoder
from spar_scale.models.diffusion import Diffusion
from spar_scale.models.initialise import initialise
from spar_scale.models.mllm import build_mllm
from spar_scale.models.presets import PRESETS, Preset
from spar_scale.models.tokenizer import UnifiedTokenizer
from spar_scale.phases import find
from spar_scale.stages.bootstrap import save_autoencoder
from spar_scale.stages.bootstrap_mllm import save_mllm
from spar_scale.stages.tokenizer_files import save_tokenizer

TINY = PRESETS["tiny"]


def make_parts(folder: Path, preset: Preset = TINY) -> dict[str, str]:
    """Write all parts of a preset under `folder`; return part -> directory.

    The diffusion model's output is not zero.
    """
    generator = torch.Generator().manual_seed(11)
    images = torch.rand(16, 3, preset.image_size, preset.image_size, generator=generator)
    directories = {name: folder / name for name in ("mllm", "pixel_autoencoder", "tokenizer", "diffusion")}
    models = {
        "mllm": build_mllm(preset),
        "pixel_autoencoder": build_autoencoder(preset),
        "tokenizer": UnifiedTokenizer(preset, pixel_encoder=False),
        "diffusion": Diffusion(preset.diffusion),
    }
    for seed, model in enumerate(models.values(), start=20):
        initialise(model, seed)
    with torch.no_grad():
        models["diffusion"].transformer.proj_out.weight.normal_(std=0.02, generator=generator)
        models["tokenizer"].fusion.linear_2.weight.normal_(std=0.02, generator=generator)
    save_mllm(models["mllm"], directories["mllm"])
    save_autoencoder(models["pixel_autoencoder"], directories["pixel_autoencoder"], images)
    save_tokenizer(models["tokenizer"], directories["tokenizer"], images)
    models["diffusion"].transformer.save_pretrained(str(directories["diffusion"]))
    return {name: str(directory) for name, directory in directories.items()}


def parts_of(stage: str, phase: str, parts: dict[str, str]) -> dict[str, str]:
    """The parts that a phase requires."""
    declared = find(stage, phase)
    return {name: parts[name] for name in (() if declared is None else declared.requires)}
