"""Asking a trained language model about a picture."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from PIL import Image
from transformers import InternVLForConditionalGeneration

from parallel.errors import UserError
from spar_scale.data.prompts import EOS, TOKENS, decode, encode, opening
from spar_scale.evaluation.reconstruction import to_tensor
from spar_scale.inference.commands import open_image
from spar_scale.models.mllm import greedy
from spar_scale.stages.parts import preset_of
from spar_scale.training.export import recipe_of, trained_model

MAX_ANSWER_TOKENS = 16


def ask(run_dir: Path, image: Path, question: str) -> str:
    """Answer a question about a picture of any size; return the answer and, on a second line, who gave it.

    Raises UserError for a run without a language model and for words that it does not know.
    """
    recipe = recipe_of(run_dir)
    if (recipe.stage, recipe.phase) != ("bootstrap", "mllm"):
        raise UserError(
            f"{run_dir}: a run of stage '{recipe.stage}', phase '{recipe.phase}', which answers no questions;"
            " a run of stage 'bootstrap', phase 'mllm' is needed"
        )
    words, picture = spaced(question), open_image(image)
    encode(words)  # refuse unknown words before anything is loaded
    model, checkpoint = trained_model(run_dir)
    assert isinstance(model, InternVLForConditionalGeneration)
    said = answer(model, picture, words, preset_of(recipe).image_size)
    return f"{said}\n(the average of {checkpoint}, {image} at {preset_of(recipe).image_size} pixels)"


def answer(model: InternVLForConditionalGeneration, picture: Image.Image, question: str, size: int) -> str:
    """Answer a question of known words about a picture, resized to `size` x `size` pixels, by greedy decoding."""
    pixels = to_tensor(picture.resize((size, size), Image.Resampling.BICUBIC))[None]
    prompt = opening(model.config.image_seq_length).ask(f"question : {question} answer :")
    stop = frozenset((TOKENS["."], TOKENS[EOS]))
    return decode(greedy(model, pixels, torch.tensor([prompt.tokens]), stop, MAX_ANSWER_TOKENS))


def spaced(question: str) -> str:
    """A question as the tokenizer reads it: small letters, words and marks apart, a question mark at the end."""
    words = re.findall(r"[^\s?.,:]+|[?.,:]", question.lower())
    if not words:
        raise UserError("the question is empty")
    return " ".join(words if words[-1] == "?" else [*words, "?"])
