"""Asking a trained language model about a picture, alone or as a part of SPAR: one way of answering."""

from __future__ import annotations

from PIL import Image

from spar_scale.inference.pictures import to_tensor
from spar_scale.stages.forward import Forward


def answer(model: Forward, picture: Image.Image, question: str) -> str:
    """Answer a question of known words about a picture, resized to the preset's size, by greedy decoding."""
    size, text = model.preset.image_size, model.text
    pixels = to_tensor(picture.resize((size, size), Image.Resampling.BICUBIC))[None]
    features = model.features(pixels)
    prompt = text.question_prompt(question, features.shape[1])
    return text.decode(model.continue_prompt(prompt, features, text.stop_ids, text.templates.answer_tokens))
