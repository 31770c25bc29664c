"""Asking a trained language model about a picture, alone or as a part of SPAR: one way of answering."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from spar_scale.inference.pictures import open_image, to_tensor
from spar_scale.inference.runs import check_length, fit_recipe, load_run, text_of_run
from spar_scale.stages.forward import Forward
from spar_scale.stages.parts import preset_of


def ask(run_dir: Path, image: Path, question: str) -> str:
    """Answer a question about a picture of any size; return the answer and, on a second line, who gave it.

    Raises UserError for a run without a language model and for words that it does not know.
    """
    recipe = fit_recipe(run_dir, "ask")
    preset, text = preset_of(recipe), text_of_run(recipe)
    words, picture = text.normalize(question, "question"), open_image(image)
    prompt = text.question_prompt(words, preset.image_tokens)
    check_length(len(prompt), preset, answer=text.templates.answer_tokens)
    run = load_run(run_dir, "ask")
    reply = answer(run.forward, picture, words)
    return f"{reply}\n({run}; {image} at {preset.image_size} pixels)"


def answer(model: Forward, picture: Image.Image, question: str) -> str:
    """Answer a question of known words about a picture, resized to the preset's size, by greedy decoding."""
    size, text = model.preset.image_size, model.text
    pixels = to_tensor(picture.resize((size, size), Image.Resampling.BICUBIC))[None]
    features = model.features(pixels)
    prompt = text.question_prompt(question, features.shape[1])
    return text.decode(model.continue_prompt(prompt, features, text.stop_ids, text.templates.answer_tokens))
