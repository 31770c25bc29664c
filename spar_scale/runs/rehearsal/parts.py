"""Random weights in the published layouts: what the phases of a folder start from, without a download."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from parallel.errors import UserError, nearest
from spar_scale.files.random_weights import write_autoencoder, write_diffusion, write_mllm
from spar_scale.models.presets import Preset
from spar_scale.objectives.perceptual import PerceptualDistance

PERCEPTUAL_FILES = {"vgg16": "vgg16-397923af.pth", "lpips": "vgg.pth", "convnext_small": "convnext_small-0c510722.pth"}


def write_part(part: str, layout: str, directory: Path, preset: Preset) -> None:
    """Write a pretrained part with random weights. Raises UserError for a layout that is not known."""
    if layout not in WRITERS:
        raise UserError(f"model.pretrained.{part}: a rehearsal cannot write this part{nearest(layout, WRITERS)}")
    WRITERS[layout](directory, preset)


def _write_perceptual(directory: Path, preset: Preset) -> None:
    """Write the networks under their published names; the heads of LPIPS are positive, as trained ones are."""
    network, generator = PerceptualDistance(convnext=True), torch.Generator().manual_seed(0)
    directory.mkdir(parents=True)
    for name, file in PERCEPTUAL_FILES.items():
        weights = network.get_submodule(name).state_dict()
        for key, weight in weights.items():
            if weight.dim() > 1:
                weight.normal_(std=(2 / weight[0].numel()) ** 0.5, generator=generator)
            else:
                weight.fill_(0.0 if key.endswith("bias") else 1.0)
        torch.save(
            {key: weight.abs() for key, weight in weights.items()} if name == "lpips" else weights, directory / file
        )


WRITERS: dict[str, Callable[[Path, Preset], None]] = {
    "mllm": write_mllm,
    "diffusion": write_diffusion,
    "pixel_autoencoder": write_autoencoder,
    "perceptual": _write_perceptual,
}
"""Name of a published part -> what writes it."""
