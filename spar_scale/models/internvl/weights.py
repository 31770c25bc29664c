"""InternVL's published layout: config.json and safetensors, read strictly and written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

from spar_scale.models.internvl.model import build_mllm, mllm_config
from spar_scale.models.internvl.shapes import LanguageShape, VisionShape
from spar_scale.models.internvl.vision import VisionEncoder, vision_config
from spar_scale.models.published import PretrainedPart, parameters_on_meta

FILES = "model"
_LANGUAGE = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
    "max_position_embeddings", "hidden_act", "rms_norm_eps", "use_sliding_window", "attention_dropout",
)  # fmt: skip
_VISION = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size",
    "attention_bias", "use_qk_norm", "norm_type", "use_mean_pooling", "hidden_act", "layer_norm_eps", "num_channels",
    "use_mask_token", "use_absolute_position_embeddings", "hidden_dropout_prob", "attention_dropout",
    "projection_dropout",
)  # fmt: skip
_OF_WEIGHTS = ("config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")
_BOTH = ("downsample_ratio", "projector_hidden_act", "vision_feature_layer", "vision_feature_select_strategy")
_HEAD, _WORDS = "lm_head.weight", "language_model.embed_tokens.weight"
_HINT = (
    "the repository in the layout of transformers, whose name ends in -hf (OpenGVLab/InternVL3-1B-hf or -2B-hf, not"
    " OpenGVLab/InternVL3-1B)"
)


def load_mllm(part: PretrainedPart, vision: VisionShape, language: LanguageShape) -> InternVLForConditionalGeneration:
    """Load InternVL in the part's precision, checked against the shapes.

    Whether its head is the matrix of its words is decided by the tensors: a head in the files is a matrix of its own,
    whatever the config says; where the files have none, it starts as a copy of the words.
    """
    copies: dict[str, str] = {}
    if part.is_checked:
        found, expected = part.config(), mllm_config(vision, language)
        _check(part, found, vision)
        assert isinstance(expected.text_config, Qwen2Config)
        text, values = found.get("text_config", {}), expected.text_config.to_dict()
        part.check(text, {name: values[name] for name in _LANGUAGE}, Qwen2Config().to_dict(), "text_config")
        part.check(_rope(text), values["rope_parameters"], section="text_config.rope_parameters")
        part.check(found, {"image_token_id": language.image_token_id}, InternVLConfig().to_dict())
        if found.get("tie_word_embeddings", True):  # the library's default
            copies = {_HEAD: f"model.{_WORDS}"}
    with parameters_on_meta():
        model = build_mllm(vision, language)
    part.fill(model, FILES, lambda name: _in_model(_canonical(name)), copies)
    return model.eval()


def load_vision(part: PretrainedPart, vision: VisionShape) -> VisionEncoder:
    """Load the vision tower and the projector of InternVL in the part's precision, whatever its language model."""
    if part.is_checked:
        _check(part, part.config(), vision)
    with parameters_on_meta():
        encoder = VisionEncoder(vision)
    part.fill(encoder, FILES, lambda name: _in_encoder(_canonical(name)))
    return encoder


def save_mllm(model: nn.Module, directory: Path) -> None:
    """Write InternVL without its tokenizer's files. Raises TypeError for another model."""
    if not isinstance(model, InternVLForConditionalGeneration):
        raise TypeError(f"expected InternVLForConditionalGeneration, got {type(model).__name__}")
    model.save_pretrained(str(directory))


def save_around(
    language_model: nn.Module, head: nn.Module, encoder: nn.Module, source: PretrainedPart, directory: Path
) -> None:
    """Write InternVL made of a language model, its head and a vision encoder with parts `vision_tower`, `projector`.

    The config and all files beside the weights (those of the text tokenizer and the processor) are those of `source`.
    """
    config: Any = InternVLConfig.from_pretrained(str(source.directory), local_files_only=True)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False  # the head is written as it is
    with torch.device("meta"):
        model: Any = InternVLForConditionalGeneration(config)
    model.model.language_model, model.lm_head = language_model, head
    model.model.vision_tower = encoder.get_submodule("vision_tower")
    model.model.multi_modal_projector = encoder.get_submodule("projector")
    model.save_pretrained(str(directory))
    for path in sorted(source.directory.iterdir()):
        if path.suffix in (".json", ".txt", ".jinja") and path.name not in _OF_WEIGHTS:
            shutil.copyfile(path, directory / path.name)


def _check(part: PretrainedPart, found: dict[str, Any], vision: VisionShape) -> None:
    """Raise UserError for a config of another kind, vision tower or projector."""
    part.check_kind(found, "model_type", "internvl", _HINT)
    expected = vision_config(vision)
    assert isinstance(expected.vision_config, InternVLVisionConfig)
    values, defaults = expected.vision_config.to_dict(), InternVLVisionConfig().to_dict()
    tower = {name: values[name] for name in _VISION}
    part.check(found.get("vision_config", {}), tower, defaults, "vision_config")
    values, defaults = expected.to_dict(), InternVLConfig().to_dict()
    part.check(found, {name: values[name] for name in _BOTH}, defaults)
    width = {"hidden_size": vision.output_width}
    part.check(found.get("text_config", {}), width, Qwen2Config().to_dict(), "text_config")


def _rope(text: dict[str, Any]) -> dict[str, Any]:
    """The rotary positions of a text config, which earlier versions of transformers spread over two keys."""
    if isinstance(text.get("rope_parameters"), dict):
        return text["rope_parameters"]
    scaling = {name: value for name, value in (text.get("rope_scaling") or {}).items() if name != "type"}
    kind = (text.get("rope_scaling") or {}).get("type", "default")
    return {"rope_type": kind, **scaling, "rope_theta": text.get("rope_theta", 10000.0)}


def _canonical(name: str) -> str:
    """The name of a weight without `model`, which versions of transformers put at different places."""
    name = name.removeprefix("model.")
    return name.replace("language_model.model.", "language_model.", 1).replace("language_model.lm_head.", "lm_head.", 1)


def _in_model(name: str) -> str:
    return name if name.startswith("lm_head.") else f"model.{name}"


def _in_encoder(name: str) -> str | None:
    """The name of a weight in `VisionEncoder`; None for those of the language model."""
    if name.split(".")[0] in ("language_model", "lm_head"):
        return None
    return name.replace("multi_modal_projector.", "projector.", 1)
