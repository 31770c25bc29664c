"""The miniature's words as a tokenizer, and the prompts that its language model learns from.

The tokenizer is one of whole words, separated by spaces: a miniature world of some sixty words needs no more, and in
return a word outside it is no guess but an error that names it. Four tasks make one language model: `captions`,
`questions`, `edits` (describe what an instruction will make of the picture) and `texts` (the same words without a
picture). Text asks, answers count: the loss is taken where `counts` is 1. Prompts that condition the diffusion model
stand in `text.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from spar_scale.data.shapes_language import SPECIAL, VOCABULARY
from spar_scale.data.text import IMAGE, IMAGE_END, IMAGE_START, Prompt, TextTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = SPECIAL
TOKENS: dict[str, int] = {word: i for i, word in enumerate((*VOCABULARY, IMAGE_START, IMAGE_END, IMAGE))}
QUESTIONS_PER_IMAGE = 3


@functools.cache
def miniature_text() -> TextTokenizer:
    """Return the miniature's tokenizer."""
    return TextTokenizer(_backend(), "the miniature's words")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the same words as a tokenizer of transformers, to be saved beside a language model."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=_backend(),
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[IMAGE_START, IMAGE_END, IMAGE],
    )


def caption_prompt(
    text: TextTokenizer, record: Mapping[str, Any], draws: np.random.Generator, image_tokens: int
) -> Prompt:
    """The picture, then `describe : CAPTION <eos>`."""
    return _opening(text, image_tokens).ask("describe :").answer("{text} <eos>", _full(record["captions"], draws))


def question_prompt(
    text: TextTokenizer, record: Mapping[str, Any], draws: np.random.Generator, image_tokens: int
) -> Prompt:
    """The picture, then up to three times `question : Q answer : A .`, of different types where it can be."""
    return _ask(_opening(text, image_tokens), record, draws, QUESTIONS_PER_IMAGE)


def edit_prompt(
    text: TextTokenizer, record: Mapping[str, Any], draws: np.random.Generator, image_tokens: int
) -> Prompt:
    """The picture as it is, then `edit : INSTRUCTION describe : CAPTION OF THE RESULT <eos>`."""
    prompt = _opening(text, image_tokens).ask("edit : {text} describe :", record["instruction"])
    return prompt.answer("{text} <eos>", _full(record["output_captions"], draws))


def text_prompt(
    text: TextTokenizer, record: Mapping[str, Any], draws: np.random.Generator, image_tokens: int
) -> Prompt:
    """No picture: `draw : CAPTION`, two questions about it, then `describe :` and a caption of the same scene."""
    prompt = _opening(text, 0).ask("draw : {text}", _full(record["captions"], draws))
    prompt = _ask(prompt, record, draws, 2).ask("describe :")
    return prompt.answer("{text} <eos>", _full(record["captions"], draws))


def _backend() -> Tokenizer:
    words = Tokenizer(WordLevel(dict(TOKENS), unk_token="<unk>"))  # which is no word: an unknown one is an error
    words.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return words


def _opening(text: TextTokenizer, image_tokens: int) -> Prompt:
    """The start of a prompt about a picture of `image_tokens` tokens; without a picture where that is 0."""
    return text.prompt().ask("<bos> {picture}", image_tokens=image_tokens)


def _ask(prompt: Prompt, record: Mapping[str, Any], draws: np.random.Generator, number: int) -> Prompt:
    listed = record["questions"]
    shuffled = [listed[i] for i in draws.permutation(len(listed))]
    types = [question["type"] for question in shuffled]
    first_of_type = sorted(range(len(shuffled)), key=lambda i: types[:i].count(types[i]))
    for question in (shuffled[i] for i in first_of_type[:number]):
        prompt.ask("question : {text} answer :", question["question"]).answer("{text} .", question["answer"])
    return prompt


def _full(captions: Sequence[str], draws: np.random.Generator) -> str:
    """One of the captions that say most: they stand in the first half."""
    if isinstance(captions, str):
        raise TypeError("its captions are one text, not a list")  # of which a letter would be taken
    return captions[int(draws.integers(-(-len(captions) // 2)))]
