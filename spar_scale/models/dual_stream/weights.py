"""The unified tokenizer on disk: what the later training stages load, written at the end of each of its phases.

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
from torch import nn

from parallel.files import write_file
from spar_scale.models.dual_stream.model import Streams, UnifiedTokenizer
from spar_scale.models.dual_stream.shapes import StreamShape
from spar_scale.models.published import PretrainedPart, shapes_only
from spar_scale.models.roles import Autoencoder, VisionEncoder

KIND, WEIGHTS = "spar_scale.UnifiedTokenizer", "model.safetensors"
TEACHERS = ("pixel_encoder", "initial_encoder")


def save_tokenizer(model: nn.Module, directory: Path, preset: str, latent_scale: float, images: int) -> None:
    """Write a tokenizer with its latent scale, which was measured on a number of images."""
    if not isinstance(model, UnifiedTokenizer):
        raise TypeError(f"expected UnifiedTokenizer, got {type(model).__name__}")
    config = {
        "kind": KIND,
        "preset": preset,
        "streams": model.streams,
        "latent_scale": latent_scale,
        "calibration_images": images,
    }
    weights = {n: t.contiguous() for n, t in model.state_dict().items() if n.split(".")[0] not in TEACHERS}
    directory.mkdir(parents=True)
    save_file(weights, directory / WEIGHTS)
    write_file(directory / "config.json", json.dumps(config, indent=1) + "\n")


def load_tokenizer(
    part: PretrainedPart, shape: StreamShape, vision: VisionEncoder, autoencoder: Autoencoder
) -> tuple[UnifiedTokenizer, float]:
    """Read a tokenizer strictly, fp32, and its latent scale.

    Raises UserError for a directory that holds no tokenizer, one of another preset, and weights that
    do not fit or cannot be read.
    """
    if shapes_only():
        return UnifiedTokenizer(shape, vision, autoencoder, pixel_encoder=False), 1.0
    config = part.config()
    if config.get("kind") != KIND:
        raise part.error(
            f"{part.directory} holds no unified tokenizer; the `pretrained` of a run of stage tokenizer is needed"
        )
    if config.get("preset") != part.preset:
        raise part.error(f"{part.directory} has preset '{config.get('preset')}', this recipe has '{part.preset}'")
    if config.get("streams") not in get_args(Streams):
        allowed = ", ".join(get_args(Streams))
        raise part.error(f"{part.config_path} has streams = {config.get('streams')}, not one of {allowed}")
    scale = part.positive(config, "latent_scale")
    try:
        weights = load_file(part.directory / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise part.error(f"{part.directory}: {WEIGHTS} cannot be read ({error})") from error
    model = UnifiedTokenizer(shape, vision, autoencoder, config["streams"], pixel_encoder=False)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name in sorted(shapes.keys() | weights.keys()):
        if name not in weights or name not in shapes or weights[name].shape != shapes[name]:
            raise part.error(f"{part.directory}: weight {name} is missing, unexpected or of another shape in {WEIGHTS}")
    model.load_state_dict({name: tensor.to(torch.float32) for name, tensor in weights.items()}, strict=True)
    return model, scale
