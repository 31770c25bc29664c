"""Asking a trained language model about a picture, alone or as a part of SPAR: one way of answering."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from spar_scale.data.prompts import EOS, TOKENS, answering_prompt, decode, encode
from spar_scale.inference.pictures import open_image, to_tensor
from spar_scale.inference.runs import fit_recipe, load_run
from spar_scale.inference.words import check_length, spaced
from spar_scale.stages.forward import Forward
from spar_scale.stages.parts import preset_of

MAX_ANSWER_TOKENS = 16


def ask(run_dir: Path, image: Path, question: str) -> str:
    """Answer a question about a picture of any size; return the answer and, on a second line, who gave it.

    Raises UserError for a run without a language model and for words that it does not know.
    """
    preset = preset_of(fit_recipe(run_dir, "ask"))
    words, picture = spaced(question), open_image(image)
    encode(words)  # refuse unknown words before anything is loaded
    check_length(len(answering_prompt(words, preset.image_tokens).tokens), MAX_ANSWER_TOKENS, preset)
    run = load_run(run_dir, "ask")
    reply = answer(run.forward, picture, words)
    return f"{reply}\n({run}; {image} at {preset.image_size} pixels)"


def answer(model: Forward, picture: Image.Image, question: str) -> str:
    """Answer a question of known words about a picture, resized to the preset's size, by greedy decoding."""
    size = model.preset.image_size
    pixels = to_tensor(picture.resize((size, size), Image.Resampling.BICUBIC))[None]
    features = model.features(pixels)
    prompt = answering_prompt(question, features.shape[1]).tokens
    stop = frozenset((TOKENS["."], TOKENS[EOS]))
    return decode(model.continue_prompt(prompt, features, stop, MAX_ANSWER_TOKENS))
