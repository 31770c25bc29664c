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
from spar_scale.models.published import PretrainedPart, copy_weights, shapes_only
from spar_scale.ops.transformers_attention import IMPLEMENTATION

_LANGUAGE = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
)  # fmt: skip
_VISION = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size",
    "attention_bias", "use_qk_norm", "norm_type", "use_mean_pooling",
)  # fmt: skip
_OF_WEIGHTS = ("config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")
VISION_PARTS = ("vision_tower", "multi_modal_projector")
"""Names of the weights that `load_vision` reads begin with one of these, behind transformers' `model`."""


def load_mllm(part: PretrainedPart, vision: VisionShape, language: LanguageShape) -> InternVLForConditionalGeneration:
    """Load InternVL, fp32, checked against the shapes."""
    if shapes_only():
        return build_mllm(vision, language)
    expected, found = mllm_config(vision, language), part.config()
    assert isinstance(expected.text_config, Qwen2Config)
    values = expected.text_config.to_dict()
    part.check(found.get("text_config", {}), {name: values[name] for name in _LANGUAGE})
    part.check(found, {"image_token_id": language.image_token_id})
    model = _load(part, vision)
    model.set_attn_implementation(IMPLEMENTATION)
    return model


def load_vision(part: PretrainedPart, vision: VisionShape) -> VisionEncoder:
    """Load the vision tower and the projector of InternVL, fp32, whatever its language model."""
    encoder = VisionEncoder(vision)
    if not shapes_only():
        found = _load(part, vision).model
        copy_weights(encoder.vision_tower, found.vision_tower)
        copy_weights(encoder.projector, found.multi_modal_projector)
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


def _load(part: PretrainedPart, vision: VisionShape) -> InternVLForConditionalGeneration:
    found, expected = part.config(), vision_config(vision)
    part.check(found, {"downsample_ratio": expected.downsample_ratio})
    part.check(found.get("text_config", {}), {"hidden_size": vision.output_width})
    assert isinstance(expected.vision_config, InternVLVisionConfig)
    values = expected.vision_config.to_dict()
    part.check(found.get("vision_config", {}), {name: values[name] for name in _VISION})
    return part.read(InternVLForConditionalGeneration)
