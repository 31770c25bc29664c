"""What a person types, as the tokenizer reads it: small letters, words and marks apart. No word is changed."""

from __future__ import annotations

import re

from parallel.errors import UserError
from spar_scale.data.prompts import WORDS
from spar_scale.models.presets import Preset

_END = frozenset(".!?,;:")


def spaced(question: str) -> str:
    """A question: a question mark at its end. UserError for an empty one."""
    words = _apart(question, "question")
    return " ".join(words if words[-1] == "?" else [*words, "?"])


def normalize_prompt(prompt: str) -> str:
    """A caption or an instruction: no mark at its end. UserError for an empty one."""
    words = _apart(prompt, "prompt")
    while words and words[-1] in _END:
        words.pop()
    if not words:
        raise UserError("the prompt has no words")
    return " ".join(words)


def check_length(num_tokens: int, following: int, preset: Preset) -> None:
    """Refuse a prompt that, with the tokens `following` it, needs more positions than the language model has."""
    limit = preset.language.max_positions - following
    if num_tokens > limit:
        raise UserError(
            f"the prompt has {num_tokens} tokens; at most {limit} fit before the {following} that follow"
            f" in the {preset.language.max_positions} positions of preset '{preset.name}'"
        )


def _apart(text: str, kind: str) -> list[str]:
    words = re.findall(r"[^\s.!?,;:]+|[.!?,;:]", text.lower())
    if not words:
        raise UserError(f"the {kind} is empty")
    if marks := [word for word in words if word.startswith("<")]:
        raise UserError(f"unknown words: '{marks[0]}'; known are {' '.join(WORDS)}")
    return words
