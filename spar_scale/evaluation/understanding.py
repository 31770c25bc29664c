"""Visual question answering: the share of questions about held-out pictures that the language model answers right.

Each scene has one question of a randomly drawn type. An answer is one word, and must be the most probable of all words.
The reference is the same model without the picture (`blind`), which can only use how often each answer occurs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spar_scale.data.images import decode, square
from spar_scale.data.order import draw_generator
from spar_scale.evaluation.scenes import first_samples
from spar_scale.stages.forward import Forward


@dataclass(frozen=True)
class VisualQuestion:
    """A picture (3, S, S) in [0, 1], a question about it with its type, and the one-word answer."""

    image: Tensor
    type: str
    question: str
    answer: str


def held_out_questions(shards: str, count: int, size: int) -> list[VisualQuestion]:
    """Return the first `count` scenes of the shards with one question each; all types of a scene are equally likely."""
    questions: list[VisualQuestion] = []
    for sample in first_samples(shards, count):
        draws, entries = draw_generator(0, "visual questions", len(questions)), json.loads(sample["json"])["questions"]
        types = sorted({entry["type"] for entry in entries})
        drawn_type = types[int(draws.integers(len(types)))]
        of_type = [entry for entry in entries if entry["type"] == drawn_type]
        entry = of_type[int(draws.integers(len(of_type)))]
        pixels = square(decode(sample["png"]), size, along=0.5, mirrored=False, fit="crop")
        questions.append(VisualQuestion(torch.from_numpy(pixels), drawn_type, entry["question"], entry["answer"]))
    return questions


def answers_right(
    model: Forward,
    encode: Callable[[Tensor], Tensor] | None,
    questions: Sequence[VisualQuestion],
    batch: int = 100,
) -> Tensor:
    """Return 1 for each question answered right, else 0, (n,) fp32; the parameters are those of `predict_answers`."""
    return compare_answers(predict_answers(model, encode, questions, batch), questions)


def compare_answers(predicted: Sequence[str], questions: Sequence[VisualQuestion]) -> Tensor:
    """Return 1 for each predicted answer that is right, else 0, (n,) fp32."""
    return torch.tensor([float(word == question.answer) for word, question in zip(predicted, questions, strict=True)])


@torch.no_grad()
def predict_answers(
    model: Forward,
    encode: Callable[[Tensor], Tensor] | None,
    questions: Sequence[VisualQuestion],
    batch: int = 100,
) -> list[str]:
    """Return the model's most probable word for each question, "" if the most probable token is not a word.

    `encode` maps images (B, 3, S, S) to the tokens (B, N, D) that the language model reads; with None the questions
    are asked without pictures.
    """
    predicted = []
    for first in range(0, len(questions), batch):
        part = questions[first : first + batch]
        features = None if encode is None else encode(torch.stack([question.image for question in part]))
        image_tokens = 0 if features is None else features.shape[1]
        prompts = [model.text.question_prompt(question.question, image_tokens) for question in part]
        best = model.next_token(prompts, features).argmax(-1)
        predicted += [model.text.decode([token]) for token in best.tolist()]
    return predicted


def accuracy_by_type(questions: Sequence[VisualQuestion], right: Tensor) -> dict[str, float]:
    """Return the share of right answers for each type of question, and for `all`."""
    kinds = sorted({question.type for question in questions})
    of_kind = {kind: [float(r) for q, r in zip(questions, right, strict=True) if q.type == kind] for kind in kinds}
    return {kind: sum(values) / len(values) for kind, values in of_kind.items()} | {"all": float(right.mean())}
