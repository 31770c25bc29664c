"""The parts a stage starts from: the preset that a recipe names, and frozen parts read from disk.

Pretrained parts are directories in their library's published layout, loaded strictly from safetensors:
a missing or unexpected tensor, another shape, or a config that differs from the preset is refused with
the dotted key of the recipe. Nothing is ever downloaded. Under `torch.device("meta")` a part has the shapes
of its preset and no values, so none is read: that is how a layout is planned without data or weights.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel
from diffusers.utils import logging as diffusers_log
from safetensors import SafetensorError
from torch import get_default_device, nn
from transformers import InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config
from transformers.utils import logging as transformers_log

from parallel.errors import UserError, nearest
from spar_scale.config.recipe import Recipe, behind_link, beside
from spar_scale.models.autoencoder import build_autoencoder
from spar_scale.models.diffusion import Diffusion
from spar_scale.models.mllm import build_mllm, mllm_config
from spar_scale.models.presets import PRESETS, Preset
from spar_scale.models.vision import vision_config
from spar_scale.phases import phase_of

_log = logging.getLogger(__name__)
for _library in (diffusers_log, transformers_log):
    _library.disable_progress_bar()  # a bar for each part of a second is noise in a log


def preset_of(recipe: Recipe) -> Preset:
    """Return the preset that `model.preset` names. Raises UserError for an unknown one."""
    name = recipe.model.preset
    if name not in PRESETS:
        raise UserError(f"model.preset: '{name}' is not one of {', '.join(sorted(PRESETS))}{nearest(name, PRESETS)}")
    return PRESETS[name]


def pretrained_directories(recipe: Recipe) -> dict[str, Path]:
    """Return `model.pretrained` as directories, relative ones taken from the run directory.

    Raises UserError for a part that the phase does not take, a required part that is not given, and a
    directory without a config.
    """
    allowed, required = phase_of(recipe).pretrained_parts(recipe)
    given: Mapping[str, str] = recipe.model.pretrained or {}
    if unknown := sorted(set(given) - set(allowed)):
        raise UserError(
            f"model.pretrained.{unknown[0]}: stage '{recipe.stage}', phase '{recipe.phase}' takes"
            f" {', '.join(allowed) or 'none'}{nearest(unknown[0], allowed)}"
        )
    if missing := sorted(set(required) - set(given)):
        raise UserError(
            f"model.pretrained.{missing[0]}: stage '{recipe.stage}', phase '{recipe.phase}' starts from this part;"
            " name its directory, relative to run_dir"
        )
    return {part: part_directory(recipe, part) for part in given}


def part_directory(recipe: Recipe, part: str) -> Path:
    """Return the directory of a part that `model.pretrained` names. Raises UserError where it holds no config."""
    run_dir, given = Path(recipe.run_dir), recipe.model.pretrained[part]
    directory = beside(run_dir, given)
    if not shapes_only() and not (directory / "config.json").is_file():
        raise UserError(f"model.pretrained.{part}: no config.json in {directory}{behind_link(run_dir, given)}")
    return directory


def shapes_only() -> bool:
    """Whether a model is being built on the meta device, where nothing has values."""
    return get_default_device().type == "meta"


def load_autoencoder(directory: Path, preset: Preset) -> tuple[AutoencoderDC, float]:
    """Load AutoencoderDC strictly from its published layout, fp32; return it and its scaling factor."""
    if shapes_only():
        return build_autoencoder(preset), preset.autoencoder.scaling_factor
    part = "pixel_autoencoder"
    wanted = preset.autoencoder.config()
    del wanted["scaling_factor"]  # no shape: what was measured when the autoencoder was trained
    found = read_config(part, directory)
    _check_config(part, directory, preset, found, wanted)
    scale = positive(part, directory, found, "scaling_factor")
    return _strictly(part, directory, AutoencoderDC, low_cpu_mem_usage=False), scale


def load_mllm(directory: Path, preset: Preset) -> InternVLForConditionalGeneration:
    """Load InternVL strictly from its published layout, fp32, checked against the preset."""
    if shapes_only():
        return build_mllm(preset)
    wanted = mllm_config(preset)
    assert isinstance(wanted.text_config, Qwen2Config)
    language = wanted.text_config.to_dict()
    shape = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
        "vocab_size",
    )  # fmt: skip
    found = read_config("mllm", directory)
    text = found.get("text_config", {})
    _check_config("mllm", directory, preset, text, {name: language[name] for name in shape})
    _check_config("mllm", directory, preset, found, {"image_token_id": preset.language.image_token_id})
    model = _load_internvl("mllm", directory, preset)
    model.set_attn_implementation("spar")
    return model


def load_vision(directory: Path, preset: Preset, part: str = "mllm") -> tuple[nn.Module, nn.Module]:
    """Load InternVL strictly from its published layout and return its (vision tower, projector), fp32."""
    model = build_mllm(preset) if shapes_only() else _load_internvl(part, directory, preset)
    return model.model.vision_tower, model.model.multi_modal_projector


def load_diffusion(directory: Path, preset: Preset) -> SanaTransformer2DModel:
    """Load a SANA diffusion transformer strictly from its published layout, fp32, checked against the preset."""
    if shapes_only():
        return Diffusion(preset.diffusion).transformer
    part = "diffusion"
    _check_config(part, directory, preset, read_config(part, directory), preset.diffusion.config())
    return _strictly(part, directory, SanaTransformer2DModel, low_cpu_mem_usage=False)


def _load_internvl(part: str, directory: Path, preset: Preset) -> InternVLForConditionalGeneration:
    found, wanted = read_config(part, directory), vision_config(preset)
    _check_config(part, directory, preset, found, {"downsample_ratio": wanted.downsample_ratio})
    _check_config(part, directory, preset, found.get("text_config", {}), {"hidden_size": preset.streams.width})
    assert isinstance(wanted.vision_config, InternVLVisionConfig)
    tower = wanted.vision_config.to_dict()
    shape = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size",
        "attention_bias", "use_qk_norm", "norm_type", "use_mean_pooling",
    )  # fmt: skip
    _check_config(part, directory, preset, found.get("vision_config", {}), {name: tower[name] for name in shape})
    return _strictly(part, directory, InternVLForConditionalGeneration)


def copy_weights(target: nn.Module, source: nn.Module) -> None:
    """Copy all weights of `source` into `target`, whose names and shapes are the same."""
    target.load_state_dict(source.state_dict(), strict=True)


def note_random_part(part: str, seed: int) -> None:
    """Say that a part was not given and is initialised from the seed instead."""
    _log.warning("model.pretrained.%s is not given: the part is initialised from seed %d and stays frozen", part, seed)


def read_config(part: str, directory: Path) -> dict[str, Any]:
    """Return the config.json of a part. Raises UserError where it cannot be read."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model.pretrained.{part}: {path} cannot be read as JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"model.pretrained.{part}: {path} holds {type(config).__name__}, not a config")
    return config


def positive(part: str, directory: Path, config: Mapping[str, Any], name: str) -> float:
    """Return a number above 0 of a config that was read from `directory`; UserError for anything else."""
    value = config.get(name)
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        path = directory / "config.json"
        raise UserError(f"model.pretrained.{part}: {path} has {name} = {value}; a number above 0 is needed")
    return float(value)


def _check_config(
    part: str, directory: Path, preset: Preset, found: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    for name, value in json.loads(json.dumps(wanted)).items():  # tuples as JSON holds them
        if _listed(found.get(name), value) != value:
            raise UserError(
                f"model.pretrained.{part}: {directory / 'config.json'} has {name} = {found.get(name)},"
                f" preset '{preset.name}' needs {value}"
            )


def _listed(found: Any, wanted: Any) -> Any:
    """A scalar where a list of equal entries is wanted means that list (published configs do both)."""
    if isinstance(wanted, list) and isinstance(found, (int, str)):
        return [found] * len(wanted)
    return found


def _strictly(part: str, directory: Path, cls: Any, **options: object) -> Any:
    """`from_pretrained` that refuses anything but an exact fit, and reads safetensors only."""
    try:
        model, report = cls.from_pretrained(
            str(directory), local_files_only=True, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"model.pretrained.{part}: the weights in {directory} cannot be read: {reason}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in report.get(kind) or ()):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"model.pretrained.{part}: {kind.replace('_keys', '')} weight {names[0]}{more} in {directory}"
            )
    return model.float()
