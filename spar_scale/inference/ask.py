"""Asking a trained language model about a picture, alone or as a part of SPAR: one way of answering."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import nn
from transformers import InternVLForConditionalGeneration, Qwen2Model

from spar_scale.data.prompts import EOS, IMAGE, TOKENS, answering_prompt, decode, encode
from spar_scale.inference.pictures import open_image, to_tensor
from spar_scale.inference.runs import fit_recipe, load_run
from spar_scale.inference.words import check_length, spaced
from spar_scale.models.mllm import greedy, merge, own_features
from spar_scale.models.tokenizer import UnifiedTokenizer
from spar_scale.models.unified import SPAR
from spar_scale.stages.parts import preset_of

MAX_ANSWER_TOKENS = 16


def ask(run_dir: Path, image: Path, question: str) -> str:
    """Answer a question about a picture of any size; return the answer and, on a second line, who gave it.

    Raises UserError for a run without a language model and for words that it does not know.
    """
    preset = preset_of(fit_recipe(run_dir, "ask"))
    words, picture = spaced(question), open_image(image)
    encode(words)  # refuse unknown words before anything is loaded
    check_length(len(answering_prompt(words, preset.vision.tokens).tokens), MAX_ANSWER_TOKENS, preset)
    run = load_run(run_dir, "ask")
    said = answer(run.model, picture, words, preset.image_size)
    return f"{said}\n({run}; {image} at {preset.image_size} pixels)"


def answer(model: nn.Module, picture: Image.Image, question: str, size: int) -> str:
    """Answer a question of known words about a picture, resized to `size` x `size` pixels, by greedy decoding.

    `model` is InternVL, or SPAR with a unified tokenizer, whose features stand for the picture then.
    Raises TypeError for any other.
    """
    pixels = to_tensor(picture.resize((size, size), Image.Resampling.BICUBIC))[None]
    with torch.no_grad():
        if isinstance(model, SPAR) and isinstance(model.tokenizer, UnifiedTokenizer):
            language, seen = model.language_model, model.tokenizer.features(pixels)
        elif isinstance(model, InternVLForConditionalGeneration):
            language, seen = model.model.language_model, own_features(model)(pixels)
        else:
            raise TypeError(f"{type(model).__name__} answers no questions")
        tokens = torch.tensor([answering_prompt(question, seen.shape[1]).tokens])
        embedded = merge(language.embed_tokens(tokens), seen, tokens == TOKENS[IMAGE])
    stop = frozenset((TOKENS["."], TOKENS[EOS]))
    return decode(greedy(cast(Qwen2Model, language), model.lm_head, embedded, stop, MAX_ANSWER_TOKENS))
