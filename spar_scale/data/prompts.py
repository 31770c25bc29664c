"""What the language model reads: the words it knows, and a sample as tokens with the ones that count.

A prompt is `<bos>`, for a picture `<img>`, one `<IMG_CONTEXT>` per image token and `</img>` (the structure
of InternVL's, without its chat turns), then words. The tokenizer is one of whole words, separated by
spaces: a miniature world of some sixty words needs no more, and in return a word outside it is no guess
but an error that names it. Words ask, answers count: the loss is taken where `counts` is 1.

Four tasks make one language model: `captions`, `questions`, `edits` (describe what an instruction will
make of the picture) and `texts` (the same words without a picture). Two condition the diffusion model:
`draw : CAPTION <img>` and, after the picture, `edit : INSTRUCTION <img>`; the queries follow. Without its
caption or instruction such a prompt is the bare instruction, the condition that guidance departs from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from parallel.errors import UserError, nearest
from spar_scale.data.shapes_language import VOCABULARY

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IMAGE_START, IMAGE_END, IMAGE = "<img>", "</img>", "<IMG_CONTEXT>"
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
TOKENS: dict[str, int] = {word: i for i, word in enumerate((*VOCABULARY, IMAGE_START, IMAGE_END, IMAGE))}
WORDS = tuple(word for word in TOKENS if not word.startswith("<"))
QUESTIONS_PER_IMAGE = 3


@dataclass
class Prompt:
    """Tokens in the making, and for each whether it counts."""

    tokens: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def ask(self, text: str) -> Prompt:
        """Append words that are given."""
        return self._append(text, 0)

    def answer(self, text: str) -> Prompt:
        """Append words that are to be predicted."""
        return self._append(text, 1)

    def _append(self, text: str, counts: int) -> Prompt:
        added = encode(text)
        self.tokens += added
        self.counts += [counts] * len(added)
        return self


def encode(text: str) -> list[int]:
    """Return the tokens of words separated by spaces. UserError lists the unknown ones, each with its nearest."""
    words = text.split()
    if unknown := list(dict.fromkeys(word for word in words if word not in TOKENS)):
        named = ", ".join(f"'{word}'{nearest(word, WORDS)}" for word in unknown)
        raise UserError(f"unknown words: {named}; known are {' '.join(WORDS)}")
    return [TOKENS[word] for word in words]


def decode(tokens: Sequence[int]) -> str:
    """Return the words of tokens; padding is left out, a number behind the words (a vocabulary is padded) is shown."""
    words = tuple(TOKENS)
    said = (words[token] if token < len(words) else f"<{token}>" for token in tokens if token != TOKENS[PAD])
    return " ".join(said)


def opening(image_tokens: int) -> Prompt:
    """The start of a prompt about a picture of `image_tokens` tokens; without a picture where that is 0."""
    picture = [IMAGE_START, *[IMAGE] * image_tokens, IMAGE_END] if image_tokens else []
    return Prompt().ask(" ".join([BOS, *picture]))


def caption_prompt(said: Mapping[str, Any], draws: np.random.Generator, image_tokens: int) -> Prompt:
    """The picture, then `describe : CAPTION <eos>`."""
    return opening(image_tokens).ask("describe :").answer(f"{_full(said['captions'], draws)} {EOS}")


def question_prompt(said: Mapping[str, Any], draws: np.random.Generator, image_tokens: int) -> Prompt:
    """The picture, then up to three times `question : Q answer : A .`, of different types where it can be."""
    return _ask(opening(image_tokens), said, draws, QUESTIONS_PER_IMAGE)


def edit_prompt(said: Mapping[str, Any], draws: np.random.Generator, image_tokens: int) -> Prompt:
    """The picture as it is, then `edit : INSTRUCTION describe : CAPTION OF THE RESULT <eos>`."""
    asked = opening(image_tokens).ask(f"edit : {_plain(said['instruction'])} describe :")
    return asked.answer(f"{_full(said['output_captions'], draws)} {EOS}")


def text_prompt(said: Mapping[str, Any], draws: np.random.Generator, image_tokens: int) -> Prompt:
    """No picture: `draw : CAPTION`, two questions about it, then `describe :` and a caption of the same scene."""
    told = opening(0).ask(f"draw : {_full(said['captions'], draws)}")
    return _ask(told, said, draws, 2).ask("describe :").answer(f"{_full(said['captions'], draws)} {EOS}")


def generation_prompt(caption: str) -> Prompt:
    """`draw : CAPTION <img>`, which the queries continue; an empty caption leaves the bare instruction."""
    return opening(0).ask(f"draw : {_plain(caption)} {IMAGE_START}")


def editing_prompt(instruction: str, image_tokens: int) -> Prompt:
    """The picture, then `edit : INSTRUCTION <img>`, which the queries continue; may be empty as a caption may."""
    return opening(image_tokens).ask(f"edit : {_plain(instruction)} {IMAGE_START}")


def answering_prompt(question: str, image_tokens: int) -> Prompt:
    """The picture, then `question : QUESTION answer :`, which the answer continues."""
    return opening(image_tokens).ask(f"question : {question} answer :")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the same words as a tokenizer of transformers, to be saved beside the model."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel(dict(TOKENS), unk_token="<unk>"))  # which is no word: an unknown one is an error
    words.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[IMAGE_START, IMAGE_END, IMAGE],
    )


def _ask(prompt: Prompt, said: Mapping[str, Any], draws: np.random.Generator, number: int) -> Prompt:
    listed = said["questions"]
    shuffled = [listed[i] for i in draws.permutation(len(listed))]
    types = [asked["type"] for asked in shuffled]
    first_of_type = sorted(range(len(shuffled)), key=lambda i: types[:i].count(types[i]))
    for asked in (shuffled[i] for i in first_of_type[:number]):
        prompt.ask(f"question : {_plain(asked['question'])} answer :").answer(f"{_plain(asked['answer'])} .")
    return prompt


def _full(captions: Sequence[str], draws: np.random.Generator) -> str:
    """One of the captions that say most: they stand in the first half."""
    if isinstance(captions, str):
        raise TypeError("its captions are one text, not a list")  # of which a letter would be taken
    return _plain(captions[int(draws.integers(-(-len(captions) // 2)))])


def _plain(text: str) -> str:
    """The text, in which a mark of ours (a picture's place, the end) is a word like any other: unknown."""
    if marks := [word for word in text.split() if word in TOKENS and word not in WORDS]:
        raise UserError(f"unknown words: '{marks[0]}'; known are {' '.join(WORDS)}")
    return text
