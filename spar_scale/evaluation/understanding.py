"""Questions about held-out pictures: how often the language model answers them right.

One question per scene, of a type drawn for it; an answer is one word and must be the model's first choice
of all words. Beside it stands the same model asked without a picture (`blind`), which knows how often
each answer is right, and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spar_scale.data.images import decode, square
from spar_scale.data.order import draw_generator
from spar_scale.data.prompts import TOKENS, answering_prompt
from spar_scale.evaluation.scenes import first_samples
from spar_scale.inference.drawing import padded
from spar_scale.stages.forward import Forward


@dataclass(frozen=True)
class VisualQuestion:
    """A picture (3, S, S) in [0, 1], a question of a type about it, and its answer of one word."""

    image: Tensor
    type: str
    question: str
    answer: str


def held_out_questions(shards: str, count: int, size: int) -> list[VisualQuestion]:
    """The first `count` scenes of the shards with one question each; types are equally likely for a scene."""
    asked: list[VisualQuestion] = []
    for sample in first_samples(shards, count):
        draws, said = draw_generator(0, "visual questions", len(asked)), json.loads(sample["json"])["questions"]
        types = sorted({entry["type"] for entry in said})
        wanted = types[int(draws.integers(len(types)))]
        of_type = [entry for entry in said if entry["type"] == wanted]
        chosen = of_type[int(draws.integers(len(of_type)))]
        pixels = square(decode(sample["png"]), size, along=0.5, mirrored=False)
        asked.append(VisualQuestion(torch.from_numpy(pixels), wanted, chosen["question"], chosen["answer"]))
    return asked


def answers_right(
    model: Forward,
    encode: Callable[[Tensor], Tensor] | None,
    questions: Sequence[VisualQuestion],
    batch: int = 100,
) -> Tensor:
    """Return for each question whether it is answered right, (n,) fp32; the parameters are those of `answers`."""
    return right(answers(model, encode, questions, batch), questions)


def right(given: Sequence[str], questions: Sequence[VisualQuestion]) -> Tensor:
    """Return for each question whether it was given its answer, (n,) fp32."""
    return torch.tensor([float(word == asked.answer) for word, asked in zip(given, questions, strict=True)])


@torch.no_grad()
def answers(
    model: Forward,
    encode: Callable[[Tensor], Tensor] | None,
    questions: Sequence[VisualQuestion],
    batch: int = 100,
) -> list[str]:
    """Return the word that answers each question; "" where the model's first choice is no word.

    `encode` maps images (B, 3, S, S) to the tokens (B, N, D) that the language model reads; None asks
    without pictures.
    """
    words, given = dict(enumerate(TOKENS)), []
    for first in range(0, len(questions), batch):
        part = questions[first : first + batch]
        seen = None if encode is None else encode(torch.stack([asked.image for asked in part]))
        image_tokens = 0 if seen is None else seen.shape[1]
        tokens, keep = padded([answering_prompt(asked.question, image_tokens) for asked in part])
        chosen = model.next_token(tokens, keep, seen).argmax(-1)
        given += [words.get(token, "") for token in chosen.tolist()]
    return given


def by_type(questions: Sequence[VisualQuestion], right: Tensor) -> dict[str, float]:
    """The share of right answers for each type of question, and for `all`."""
    kinds = sorted({asked.type for asked in questions})
    shares = {
        kind: [float(r) for asked, r in zip(questions, right, strict=True) if asked.type == kind] for kind in kinds
    }
    return {kind: sum(values) / len(values) for kind, values in shares.items()} | {"all": float(right.mean())}
