"""The unified tokenizer on disk: what the later stages load, written at the end of each of its phases.

A directory with `model.safetensors`, the weights without the teachers, and `config.json`: the preset,
the streams, and `latent_scale`, the inverse deviation of its latents over the calibration images.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from parallel.errors import UserError
from parallel.files import write_file
from spar_scale.models.autoencoder import latent_scale
from spar_scale.models.presets import Preset
from spar_scale.models.tokenizer import Streams, UnifiedTokenizer
from spar_scale.stages.parts import positive, read_config, shapes_only

KIND, WEIGHTS = "spar_scale.UnifiedTokenizer", "model.safetensors"
TEACHERS = ("pixel_encoder", "initial_encoder")
PART = "tokenizer"


def save_tokenizer(model: nn.Module, directory: Path, images: Tensor | None) -> None:
    """Write a tokenizer; its latent scale is measured on images (n, 3, S, S)."""
    if not isinstance(model, UnifiedTokenizer) or images is None:
        raise TypeError("a unified tokenizer and images to measure its latents on are needed")
    config = {
        "kind": KIND,
        "preset": model.preset,
        "streams": model.streams,
        "latent_scale": latent_scale(model.encode, images),
        "calibration_images": len(images),
    }
    weights = {n: t.contiguous() for n, t in model.state_dict().items() if n.split(".")[0] not in TEACHERS}
    directory.mkdir(parents=True)
    save_file(weights, directory / WEIGHTS)
    write_file(directory / "config.json", json.dumps(config, indent=1) + "\n")


def load_tokenizer(directory: Path, preset: Preset) -> tuple[UnifiedTokenizer, float]:
    """Read a tokenizer strictly, fp32, and its latent scale.

    Raises UserError for a directory that holds no tokenizer, one of another preset, and weights that
    do not fit or cannot be read.
    """
    if shapes_only():
        return UnifiedTokenizer(preset, "dual", pixel_encoder=False), 1.0
    config, where = read_config(PART, directory), f"model.pretrained.{PART}: {directory}"
    if config.get("kind") != KIND:
        raise UserError(f"{where} holds no unified tokenizer; the `pretrained` of a run of stage tokenizer is needed")
    if config.get("preset") != preset.name:
        raise UserError(f"{where} has preset '{config.get('preset')}', this recipe has '{preset.name}'")
    if config.get("streams") not in get_args(Streams):
        allowed = ", ".join(get_args(Streams))
        raise UserError(f"{where}/config.json has streams = {config.get('streams')}, not one of {allowed}")
    scale = positive(PART, directory, config, "latent_scale")
    try:
        weights = load_file(directory / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{where}: {WEIGHTS} cannot be read ({error})") from error
    model = UnifiedTokenizer(preset, config["streams"], pixel_encoder=False)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name in sorted(shapes.keys() | weights.keys()):
        if name not in weights or name not in shapes or weights[name].shape != shapes[name]:
            raise UserError(f"{where}: weight {name} is missing, unexpected or of another shape in {WEIGHTS}")
    model.load_state_dict({name: tensor.to(torch.float32) for name, tensor in weights.items()}, strict=True)
    return model, scale
