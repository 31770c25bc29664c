"""Text as tokens: a tokenizer read from the directory of a language model, and the prompts in which text stands.

One class reads every tokenizer from `tokenizer.json`, the file of the library `tokenizers`: the byte-pair encoding of
Qwen2.5 and InternVL3, and the word list of the miniature. The vocabulary decides the wording of prompts (`Templates`).
Marks (a picture's place, the turns of a chat) get into a prompt by their ids alone: text that spells one stays text,
and where each word is a token it is refused as an unknown word.

The wording for published models, without a system turn, with the picture behind the instruction, and with a bare
instruction in place of a dropped caption, is that of SPAR's authors.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from parallel.errors import UserError, nearest

IMAGE_START, IMAGE_END, IMAGE = "<img>", "</img>", "<IMG_CONTEXT>"
TEXT, PICTURE = "{text}", "{picture}"
_PAIRS = re.compile(r"[^\s.!?,;:]+|[.!?,;:]")
_ENDS = frozenset(".!?,;:")


@dataclass(frozen=True)
class Templates:
    """How prompts are worded. `{text}` is given text, `{picture}` a picture's tokens between `<img>` and `</img>`."""

    marks: tuple[str, ...]
    """Tokens of the templates, beside those of a picture, that text can never become."""
    generation: str
    bare_generation: str
    """The condition that guidance departs from: the prompt of a dropped caption."""
    editing: str
    bare_editing: str
    question: str
    stops: tuple[str, ...]
    """Tokens at which an answer ends."""
    answer_tokens: int
    """Tokens of the longest answer."""


WORDS = Templates(
    marks=("<pad>", "<bos>", "<eos>"),
    generation="<bos> draw : {text} <img>",
    bare_generation="<bos> draw : <img>",
    editing="<bos> {picture} edit : {text} <img>",
    bare_editing="<bos> {picture} edit : <img>",
    question="<bos> {picture} question : {text} answer :",
    stops=(".", "<eos>"),
    answer_tokens=16,
)
"""Of the miniature, whose tokens are words."""
CHAT = Templates(
    marks=("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    generation="<|im_start|>user\nGenerate an image: {text}<|im_end|>\n<|im_start|>assistant\n<img>",
    bare_generation="<|im_start|>user\nGenerate an image.<|im_end|>\n<|im_start|>assistant\n<img>",
    editing="<|im_start|>user\nEdit the image: {text}\n{picture}<|im_end|>\n<|im_start|>assistant\n<img>",
    bare_editing="<|im_start|>user\nEdit the image.\n{picture}<|im_end|>\n<|im_start|>assistant\n<img>",
    question="<|im_start|>user\n{picture}\n{text}<|im_end|>\n<|im_start|>assistant\n",
    stops=("<|im_end|>", "<|endoftext|>"),
    answer_tokens=256,
)
"""ChatML, of the published language models."""


@dataclass
class Prompt:
    """Tokens in the making, and for each whether it counts: 1 where it is to be predicted."""

    text: TextTokenizer
    tokens: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def ask(self, template: str, given: str = "", image_tokens: int = 0) -> Prompt:
        """Append tokens that are given: a template and the text in it."""
        return self._append(self.text.tokens_of(template, given, image_tokens), 0)

    def answer(self, template: str, given: str = "") -> Prompt:
        """Append tokens that are to be predicted."""
        return self._append(self.text.tokens_of(template, given), 1)

    def _append(self, added: list[int], counts: int) -> Prompt:
        self.tokens += added
        self.counts += [counts] * len(added)
        return self


class TextTokenizer:
    """A tokenizer with its templates; `source` names it in errors. Raises UserError where no templates fit it."""

    def __init__(self, backend: Tokenizer, source: str):
        self.source, self._backend = source, backend
        backend.encode_special_tokens = True  # text that spells a mark is tokenized as text
        self.vocabulary: Mapping[str, int] = backend.get_vocab(with_added_tokens=True)
        found = [one for one in (CHAT, WORDS) if all(mark in self.vocabulary for mark in one.marks)]
        if not found:
            raise UserError(f"{source}: no prompts are known for a tokenizer without {' '.join(CHAT.marks)}")
        self.templates = found[0]
        marks = (*self.templates.marks, IMAGE_START, IMAGE_END, IMAGE)
        if missing := [mark for mark in marks if mark not in self.vocabulary]:
            raise UserError(f"{source}: the tokenizer has no {missing[0]}; it is of no model that reads pictures")
        self.marks = {mark: self.vocabulary[mark] for mark in marks}
        self.has_words_only = self.templates is WORDS

    def __reduce__(self) -> Any:
        return TextTokenizer, (self._backend, self.source)

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.vocabulary.values()) + 1

    @property
    def image_token_id(self) -> int:
        """The token that a feature of a picture replaces."""
        return self.marks[IMAGE]

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens at which an answer ends."""
        return frozenset(self.vocabulary[stop] for stop in self.templates.stops)

    @functools.cached_property
    def words(self) -> tuple[str, ...]:
        """Where each word is a token: the words, in the order of their ids."""
        ordered = sorted(self.vocabulary, key=lambda word: self.vocabulary[word])
        return tuple(word for word in ordered if word not in self.marks)

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of everything that decides which tokens a text becomes."""
        parts = json.loads(self._backend.to_str())
        kept = {name: parts.get(name) for name in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the tokens of text, none of them a mark.

        Where each word is a token, UserError lists the unknown ones, each with its nearest.
        """
        if self.has_words_only:
            self._check_words(text)
        tokens: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        if made := set(tokens) & set(self.marks.values()):
            mark = next(mark for mark, token in self.marks.items() if token in made)
            raise UserError(f"{self.source}: text became the mark {mark}; the tokenizer does not list it as special")
        return tokens

    def shorten(self, text: str, num_tokens: int) -> str:
        """Return a text without its last `num_tokens` tokens, or a few more; no character is cut in two."""
        offsets = self._backend.encode(text, add_special_tokens=False).offsets
        first_left_out = max(0, len(offsets) - num_tokens)
        return text[: offsets[first_left_out][0]].rstrip() if offsets else ""

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens without marks; a number behind the vocabulary (models pad it) is shown."""
        if self.has_words_only:
            return " ".join(self.name(token) for token in tokens if token != self.marks["<pad>"])
        return self._backend.decode(list(tokens), skip_special_tokens=True).strip()

    def name(self, token: int) -> str:
        """Return one token as it is shown to people."""
        if token in self.marks.values() or self.has_words_only:
            return self._backend.id_to_token(token) or f"<{token}>"
        return self._backend.decode([token]) or f"<{token}>"

    def prompt(self) -> Prompt:
        """Return an empty prompt."""
        return Prompt(self)

    def generation_prompt(self, caption: str) -> list[int]:
        """Return the prompt of a picture, which queries continue; an empty caption gives the bare instruction."""
        form = self.templates
        return self.tokens_of(form.generation if caption else form.bare_generation, caption)

    def editing_prompt(self, instruction: str, image_tokens: int) -> list[int]:
        """Return the prompt of an edited picture; an empty instruction leaves the bare one, and the picture."""
        form = self.templates
        return self.tokens_of(form.editing if instruction else form.bare_editing, instruction, image_tokens)

    def question_prompt(self, question: str, image_tokens: int) -> list[int]:
        """Return the prompt of a question about a picture, or, with 0 image tokens, without one."""
        return self.tokens_of(self.templates.question, question, image_tokens)

    def tokens_of(self, template: str, text: str = "", image_tokens: int = 0) -> list[int]:
        """Return the tokens of a template: its marks by their ids, all between two marks as one text."""
        picture = [self.marks[IMAGE_START], *[self.marks[IMAGE]] * image_tokens, self.marks[IMAGE_END]]
        tokens: list[int] = []
        for piece in self._split(template):
            if piece in self.marks:
                tokens.append(self.marks[piece])
            elif piece == PICTURE:
                tokens += picture if image_tokens else []
            else:
                tokens += self.encode(piece.replace(TEXT, text))
        return tokens

    def normalize(self, text: str, kind: str) -> str:
        """Return what a person typed (`kind`: prompt or question) as the tokenizer reads it.

        Where each word is a token: lower case, words and punctuation apart, no mark at the end of a prompt, a question
        mark at that of a question. Raises UserError for an empty text and for a word that only a mark is.
        """
        if not self.has_words_only:
            words = [text.strip()] if text.strip() else []
        else:
            words = _PAIRS.findall(text.lower())
            while kind == "prompt" and words and words[-1] in _ENDS:
                words.pop()
            if kind == "question" and words and words[-1] != "?":
                words.append("?")
        if not words:
            raise UserError(f"the {kind} is empty")
        self.encode(" ".join(words))
        return " ".join(words)

    def _check_words(self, text: str) -> None:
        known, marks = self.vocabulary, self.marks
        if unknown := list(dict.fromkeys(word for word in text.split() if word not in known or word in marks)):
            named = ", ".join(f"'{word}'{nearest(word, self.words)}" for word in unknown)
            raise UserError(f"unknown words: {named}; known are {' '.join(self.words)}")

    @functools.cached_property
    def _marks_pattern(self) -> re.Pattern[str]:
        return re.compile(f"({'|'.join(re.escape(mark) for mark in (*self.marks, PICTURE))})")

    def _split(self, template: str) -> list[str]:
        return [piece for piece in self._marks_pattern.split(template) if piece and (piece.strip() or piece == "\n")]
