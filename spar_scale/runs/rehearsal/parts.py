"""Random weights in the published layouts: what the phases of a folder start from, without a download.

A part is written as its library, or the converter of its publisher, writes it, so that the phases read it by the code
that reads the published one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from parallel.errors import UserError, nearest
from spar_scale.models.initialise import initialise
from spar_scale.models.internvl import build_mllm
from spar_scale.models.presets import Preset

SEED = 7
_MOVED = {"lm_head.": "language_model.lm_head.", "model.language_model.": "language_model.model.", "model.": ""}
"""Beginning of a name in transformers 5 -> in the published files, which transformers 4.52 wrote."""
_AFTER_CONVERSION = ("tie_word_embeddings", "_name_or_path", "transformers_version", "rope_parameters", "layer_types")
"""Keys that configs written by transformers 5 have and published ones do not."""


def write_part(part: str, layout: str, directory: Path, preset: Preset) -> None:
    """Write a pretrained part with random weights. Raises UserError for a layout that is not known."""
    if layout not in WRITERS:
        raise UserError(f"model.pretrained.{part}: a rehearsal cannot write this part{nearest(layout, WRITERS)}")
    WRITERS[layout](preset, directory)


def _mllm(preset: Preset, directory: Path) -> None:
    """InternVL as published: bf16, names and config of the time of its conversion."""
    model: Any = build_mllm(preset.vision, preset.language)
    initialise(model, SEED)
    config = model.config.to_dict() | {"architectures": ["InternVLForConditionalGeneration"]}
    text, rope = config["text_config"], config["text_config"]["rope_parameters"]
    text |= {"rope_theta": rope["rope_theta"], "architectures": ["Qwen2ForCausalLM"]}
    if rope["rope_type"] != "default":
        text["rope_scaling"] = {"rope_type": rope["rope_type"], "type": rope["rope_type"], "factor": rope["factor"]}
    weights = {_published(name): tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    directory.mkdir(parents=True, exist_ok=True)
    for section in (config, text, config["vision_config"]):
        for key in _AFTER_CONVERSION:
            section.pop(key, None)
        section["torch_dtype"] = "bfloat16"
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def _published(name: str) -> str:
    moved, placed = next((one for one in _MOVED.items() if name.startswith(one[0])), ("", ""))
    return placed + name.removeprefix(moved)


def _diffusion(preset: Preset, directory: Path) -> None:
    model = preset.diffusion.build()
    initialise(model, SEED)
    preset.diffusion.save(model, directory)


def _autoencoder(preset: Preset, directory: Path) -> None:
    model = preset.autoencoder.build()
    initialise(model, SEED)
    preset.autoencoder.save(model, directory)


WRITERS: dict[str, Callable[[Preset, Path], None]] = {
    "mllm": _mllm,
    "diffusion": _diffusion,
    "pixel_autoencoder": _autoencoder,
}
"""Name of a published part -> what writes it."""
