"""Random weights in the published layouts: what a rehearsal or a measurement loads in place of published files.

Names, shapes and config files are those of the published directories; values are normal with deviation 0.02, norms 1
and biases 0. One part is in memory at a time, in the type in which it is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from parallel.files import write_file
from spar_scale.models import internvl
from spar_scale.models.presets import Preset
from spar_scale.objectives.perceptual import PerceptualDistance

Layout = Literal["older", "newer"]
"""Names of InternVL's weights: `language_model.model...`, as its `-hf` repositories have them, or
`model.language_model...`, as later versions of transformers name the modules."""

PERCEPTUAL_FILES = {
    "vgg16": "vgg16-397923af.pth",
    "lpips": "vgg.pth",
    "convnext_small": "convnext_small-0c510722.pth",
}
"""Perceptual network -> the name of its published file."""
_DEVIATION = 0.02


def write_mllm(
    directory: Path,
    preset: Preset,
    layout: Layout = "older",
    dtype: torch.dtype = torch.bfloat16,
    tie_flag: bool | None = None,
    with_head: bool = True,
) -> None:
    """Write InternVL-hf without tokenizer files; `tie_flag` None leaves the flag out, as published configs do."""
    vision, language = preset.vision, preset.language
    with torch.device("meta"):
        model: Any = internvl.build_mllm(vision, language)
    weights = _random(model, dtype, _older_name if layout == "older" else str)
    if not with_head:
        weights = {name: tensor for name, tensor in weights.items() if "lm_head" not in name}
    text, tower = model.config.text_config, model.config.vision_config
    rope: dict[str, Any] = dict(text.rope_parameters)
    scaling = {"factor": rope["factor"], "rope_type": "dynamic", "type": "dynamic"} if "factor" in rope else None
    config = {
        "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": model.config.downsample_ratio,
        "image_seq_length": vision.tokens,
        "image_token_id": language.image_token_id,
        "model_type": "internvl",
        "projector_hidden_act": "gelu",
        "text_config": {
            **_values(text, "attention_dropout", "hidden_act", "hidden_size", "initializer_range"),
            **_values(text, "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers"),
            **_values(text, "num_key_value_heads", "rms_norm_eps", "vocab_size", "use_sliding_window"),
            "max_window_layers": 70,
            "model_type": "qwen2",
            "rope_scaling": scaling,
            "rope_theta": rope["rope_theta"],
            "sliding_window": None,
        },
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.52.0.dev0",
        "vision_config": {
            **_values(tower, "attention_bias", "attention_dropout", "hidden_act", "hidden_dropout_prob", "hidden_size"),
            **_values(tower, "image_size", "intermediate_size", "layer_norm_eps", "layer_scale_init_value"),
            **_values(tower, "norm_type", "num_attention_heads", "num_channels", "num_hidden_layers", "patch_size"),
            **_values(tower, "projection_dropout", "use_absolute_position_embeddings", "use_mask_token"),
            **_values(tower, "use_mean_pooling", "use_qk_norm"),
            "model_type": "internvl_vision",
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }
    if tie_flag is not None:
        config["tie_word_embeddings"] = tie_flag
    _write(directory, config, weights, "model")


def write_diffusion(
    directory: Path, preset: Preset, dtype: torch.dtype = torch.float32, shards: int = 1, variant: str = ""
) -> None:
    """Write SANA in the layout of diffusers, in so many files (with an index where they are several)."""
    with torch.device("meta"):
        model: Any = preset.diffusion.build().transformer
    config = {"_class_name": "SanaTransformer2DModel", "_diffusers_version": "0.32.0.dev0", **dict(model.config)}
    for name in ("guidance_embeds", "guidance_embeds_scale", "qk_norm", "timestep_scale"):  # keys of later versions
        del config[name]
    _write(directory, _public(config), _random(model, dtype), "diffusion_pytorch_model", shards, variant)


def write_autoencoder(directory: Path, preset: Preset, dtype: torch.dtype = torch.float32, conv: str = "Conv") -> None:
    """Write DC-AE in the layout of diffusers; `conv` is the spelling of a down-sampling by convolution."""
    with torch.device("meta"):
        model: Any = preset.autoencoder.build()
    config = {"_class_name": "AutoencoderDC", "_diffusers_version": "0.32.0.dev0", **dict(model.config)}
    if config["downsample_block_type"] == "Conv":
        config["downsample_block_type"] = conv
    for name in ("decoder_conv_act_fn", "decoder_in_shortcut", "encoder_out_shortcut"):  # keys of later versions
        del config[name]
    _write(directory, _public(config), _random(model, dtype), "diffusion_pytorch_model")


def write_perceptual(directory: Path, network: PerceptualDistance) -> None:
    """Write the files of the perceptual networks under their published names, those of torchvision and of lpips."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, file in PERCEPTUAL_FILES.items():
        part: nn.Module | None = getattr(network, name)
        if part is not None:
            classifier = (
                {"classifier.0.weight": torch.zeros(1, 1)} if name == "vgg16" else {}
            )  # published, and not used
            torch.save({**part.state_dict(), **classifier}, directory / file)


def perceptual_networks(convnext: bool = True) -> PerceptualDistance:
    """Return the perceptual networks with weights that keep activations near 1, each from a seed of its own."""
    network = PerceptualDistance(convnext)
    for index, (name, weight) in enumerate(sorted(network.state_dict().items(), reverse=True)):
        drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(index))
        if name.startswith("lpips"):  # which are not negative, so that a distance is not
            weight.copy_(drawn.abs())
        elif "layer_scale" in name:
            weight.copy_(0.3 * drawn)
        elif weight.dim() == 1:
            weight.copy_(0.1 * drawn + (1.0 if name.endswith("weight") else 0.0))
        else:
            weight.copy_(drawn * (2 / weight[0].numel()) ** 0.5)
    return network


def _older_name(name: str) -> str:
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    inner = name.removeprefix("model.")
    return inner.replace("language_model.", "language_model.model.", 1)


def _random(model: nn.Module, dtype: torch.dtype, rename: Callable[[str], str] = str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, tensor in model.state_dict().items():
        if tensor.dim() > 1:
            value = torch.empty(tensor.shape, dtype=dtype).normal_(std=_DEVIATION, generator=generator)
        else:
            value = torch.full(tensor.shape, 0.0 if name.endswith("bias") else 1.0, dtype=dtype)
        weights[rename(name)] = value
    return weights


def _write(
    directory: Path,
    config: Mapping[str, Any],
    weights: dict[str, Tensor],
    stem: str,
    shards: int = 1,
    variant: str = "",
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    suffix = f".{variant}" if variant else ""
    names = list(weights)
    if shards == 1:
        save_file(weights, directory / f"{stem}{suffix}.safetensors", {"format": "pt"})
    else:
        files = [f"{stem}-{index + 1:05}-of-{shards:05}{suffix}.safetensors" for index in range(shards)]
        for index, file in enumerate(files):
            save_file({name: weights[name] for name in names[index::shards]}, directory / file, {"format": "pt"})
        placed = {name: files[index % shards] for index, name in enumerate(names)}
        size = sum(tensor.nbytes for tensor in weights.values())
        index_file = {"metadata": {"total_size": size}, "weight_map": placed}
        write_file(directory / f"{stem}.safetensors.index{suffix}.json", json.dumps(index_file, indent=2) + "\n")
    write_file(directory / "config.json", json.dumps(config, indent=2) + "\n")


def _values(config: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    private = ("_use_default_values", "_name_or_path")
    return {name: value for name, value in config.items() if name not in private}
