"""The multimodal language model: transformers' InternVL (vision tower, projector, Qwen2), built from shapes.

The modules are transformers' own, so published weights fit by name. Their forward is cut into pieces (`vision.py`,
`language.py`) that a list of layers composes (`layers.py`); a test holds the list equal to
`InternVLForConditionalGeneration`.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Config

from spar_scale.models.internvl.shapes import LanguageShape, VisionShape
from spar_scale.models.internvl.vision import vision_config
from spar_scale.ops.transformers_attention import IMPLEMENTATION


def build_mllm(vision: VisionShape, language: LanguageShape) -> InternVLForConditionalGeneration:
    """Return the model, weights at random from the global generator (call `initialise`)."""
    model = InternVLForConditionalGeneration(mllm_config(vision, language))
    model.set_attn_implementation(IMPLEMENTATION)
    return model


def spread_words(model: nn.Module, language: LanguageShape) -> None:
    """Scale initial word embeddings to `word_range`; transformers initialises all weights with one deviation."""
    assert isinstance(model, InternVLForConditionalGeneration)
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight *= language.word_range / language.initializer_range


def mllm_config(vision: VisionShape, language: LanguageShape) -> InternVLConfig:
    """Return the whole InternVL config."""
    config = vision_config(vision)
    rope: dict[str, str | float] = {"rope_type": "default", "rope_theta": language.rope_theta}
    if language.rope_factor is not None:
        rope |= {"rope_type": "dynamic", "factor": language.rope_factor}
    config.text_config = Qwen2Config(
        vocab_size=language.vocab_size,
        hidden_size=language.width,
        num_hidden_layers=language.layers,
        num_attention_heads=language.heads,
        num_key_value_heads=language.key_value_heads,
        intermediate_size=language.mlp_width,
        max_position_embeddings=language.max_positions,
        rope_parameters=rope,
        initializer_range=language.initializer_range,
        tie_word_embeddings=False,
    )
    config.tie_word_embeddings = False  # the one that counts; a tied matrix could not stand at both ends of a pipeline
    config.image_token_id = language.image_token_id
    config.image_seq_length = vision.tokens
    return config
