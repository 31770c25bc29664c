"""The unified tokenizer on disk: what the later training stages load, written at the end of each of its phases.

A directory with `model.safetensors`, the weights without the teachers, and `config.json`: the preset,
the streams, and `latent_scale`, the inverse deviation of its latents over the calibration images.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

from safetensors.torch import save_file
from torch import nn

from parallel.files import write_file
from spar_scale.models.dual_stream.model import Streams, UnifiedTokenizer
from spar_scale.models.dual_stream.shapes import StreamShape
from spar_scale.models.published import PretrainedPart, parameters_on_meta
from spar_scale.models.roles import Autoencoder, VisionEncoder

KIND, FILES = "spar_scale.UnifiedTokenizer", "model"
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
    save_file(weights, directory / f"{FILES}.safetensors")
    write_file(directory / "config.json", json.dumps(config, indent=1) + "\n")


def load_tokenizer(
    part: PretrainedPart, shape: StreamShape, vision: VisionEncoder, autoencoder: Autoencoder
) -> tuple[UnifiedTokenizer, float]:
    """Read a tokenizer strictly, in the precision of the part, and its latent scale.

    Raises UserError for a directory that holds no tokenizer, one of another preset, and weights that
    do not fit or cannot be read.
    """
    streams, scale = "dual", 1.0
    if part.is_checked:
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
        streams, scale = config["streams"], part.positive(config, "latent_scale")
    with parameters_on_meta():
        model = UnifiedTokenizer(shape, vision, autoencoder, streams, pixel_encoder=False)
    part.fill(model, FILES)
    return model, scale
