"""Prompts of the language model: the vocabulary, and samples as tokens with a mask of those that the loss counts.

A prompt is `<bos>`; for a picture `<img>`, one `<IMG_CONTEXT>` per image token and `</img>` (the structure of
InternVL's prompts, without chat turns); then words. The tokenizer splits at spaces into whole words. That is enough for
a miniature world of about sixty words, and an unknown word gives an error that names it instead of a guess. The loss is
computed where `counts` is 1: on answers, not on given words.

Four tasks train the language model: `captions`, `questions`, `edits` (describe the result of an instruction) and
`texts` (the same words without a picture). Two condition the diffusion model: `draw : CAPTION <img>` and, after the
picture, `edit : INSTRUCTION <img>`; the queries follow. A prompt without its caption or instruction is the
unconditional prompt of classifier-free guidance.
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
    """A prompt under construction: its tokens, and for each token 1 if the loss counts it, else 0."""

    tokens: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def ask(self, text: str) -> Prompt:
        """Append words that are given to the model."""
        return self._append(text, 0)

    def answer(self, text: str) -> Prompt:
        """Append words that the model must predict."""
        return self._append(text, 1)

    def _append(self, text: str, counts: int) -> Prompt:
        added = encode(text)
        self.tokens += added
        self.counts += [counts] * len(added)
        return self


def encode(text: str) -> list[int]:
    """Return the tokens of words separated by spaces. Raises UserError that lists unknown words and suggestions."""
    words = text.split()
    if unknown := list(dict.fromkeys(word for word in words if word not in TOKENS)):
        suggestions = ", ".join(f"'{word}'{nearest(word, WORDS)}" for word in unknown)
        raise UserError(f"unknown words: {suggestions}; known are {' '.join(WORDS)}")
    return [TOKENS[word] for word in words]


def decode(tokens: Sequence[int]) -> str:
    """Return the words of tokens, without padding.

    A model's vocabulary is padded, so it can predict a token beyond the words, which is returned as `<number>`.
    """
    words = tuple(TOKENS)
    return " ".join(words[token] if token < len(words) else f"<{token}>" for token in tokens if token != TOKENS[PAD])


def opening(image_tokens: int) -> Prompt:
    """Return the start of a prompt with a picture of `image_tokens` tokens; 0 means no picture."""
    picture = [IMAGE_START, *[IMAGE] * image_tokens, IMAGE_END] if image_tokens else []
    return Prompt().ask(" ".join([BOS, *picture]))


def caption_prompt(record: Mapping[str, Any], draws: np.random.Generator, image_tokens: int) -> Prompt:
    """Return the picture, then `describe : CAPTION <eos>`."""
    return opening(image_tokens).ask("describe :").answer(f"{_detailed(record['captions'], draws)} {EOS}")


def question_prompt(record: Mapping[str, Any], draws: np.random.Generator, image_tokens: int) -> Prompt:
    """Return the picture, then up to three `question : Q answer : A .`, of different types if possible."""
    return _add_questions(opening(image_tokens), record, draws, QUESTIONS_PER_IMAGE)


def edit_prompt(record: Mapping[str, Any], draws: np.random.Generator, image_tokens: int) -> Prompt:
    """Return the source picture, then `edit : INSTRUCTION describe : CAPTION OF THE RESULT <eos>`."""
    given = opening(image_tokens).ask(f"edit : {_check_words(record['instruction'])} describe :")
    return given.answer(f"{_detailed(record['output_captions'], draws)} {EOS}")


def text_prompt(record: Mapping[str, Any], draws: np.random.Generator, image_tokens: int) -> Prompt:
    """Return a prompt without picture: `draw : CAPTION`, two questions, then `describe :` and another caption."""
    prompt = opening(0).ask(f"draw : {_detailed(record['captions'], draws)}")
    _add_questions(prompt, record, draws, 2).ask("describe :")
    return prompt.answer(f"{_detailed(record['captions'], draws)} {EOS}")


def generation_prompt(caption: str) -> Prompt:
    """Return `draw : CAPTION <img>`, after which the queries follow; '' gives the unconditional prompt."""
    return opening(0).ask(f"draw : {_check_words(caption)} {IMAGE_START}")


def editing_prompt(instruction: str, image_tokens: int) -> Prompt:
    """Return the picture, then `edit : INSTRUCTION <img>`, after which the queries follow; '' is unconditional."""
    return opening(image_tokens).ask(f"edit : {_check_words(instruction)} {IMAGE_START}")


def answering_prompt(question: str, image_tokens: int) -> Prompt:
    """Return the picture, then `question : QUESTION answer :`, after which the model predicts the answer."""
    return opening(image_tokens).ask(f"question : {question} answer :")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the vocabulary as a transformers tokenizer, which is saved beside the model."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel(dict(TOKENS), unk_token="<unk>"))  # not in the vocabulary: unknown words are errors
    words.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[IMAGE_START, IMAGE_END, IMAGE],
    )


def _add_questions(prompt: Prompt, record: Mapping[str, Any], draws: np.random.Generator, number: int) -> Prompt:
    questions = record["questions"]
    shuffled = [questions[i] for i in draws.permutation(len(questions))]
    types = [entry["type"] for entry in shuffled]
    first_of_type = sorted(range(len(shuffled)), key=lambda i: types[:i].count(types[i]))
    for entry in (shuffled[i] for i in first_of_type[:number]):
        question, answer = _check_words(entry["question"]), _check_words(entry["answer"])
        prompt.ask(f"question : {question} answer :").answer(f"{answer} .")
    return prompt


def _detailed(captions: Sequence[str], draws: np.random.Generator) -> str:
    """Draw one of the detailed captions, which are the first half of the list."""
    if isinstance(captions, str):
        raise TypeError("its captions are one text, not a list")  # indexing the text would give one letter
    return _check_words(captions[int(draws.integers(-(-len(captions) // 2)))])


def _check_words(text: str) -> str:
    """Return the text. Raises UserError if it contains a special token such as `<IMG_CONTEXT>` or `<eos>`."""
    if marks := [word for word in text.split() if word in TOKENS and word not in WORDS]:
        raise UserError(f"unknown words: '{marks[0]}'; known are {' '.join(WORDS)}")
    return text
