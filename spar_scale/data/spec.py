"""The specification of a training stage's samples: the tensors of one sample and its random draws.

Every draw is keyed by (seed, purpose, sample number), so it does not depend on the rank, worker or layout that loads
the sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from spar_scale.data.text import TextTokenizer


@dataclass(frozen=True)
class Draw:
    """A random tensor that a sample carries: its shape without batch, and its distribution."""

    shape: tuple[int, ...]
    distribution: Literal["normal", "uniform"]


@dataclass(frozen=True)
class SampleSpec:
    """The samples of a training stage.

    `task` names a task, or a mixture of tasks with one task per source; `image_size` is the side of the square image in
    pixels; `crop` and `flip` are the augmentations; `num_tokens` is the length of the text, `task_tokens` that of each
    language task; `image_tokens` is the number of tokens per picture; `caption_dropout` is the share of samples with
    the unconditional prompt instead of their caption; `draws` maps a slot name to its random fp32 tensor; `text` is
    the tokenizer of its prompts.
    """

    task: str
    image_size: int
    crop: Literal["random", "center"] = "random"
    flip: bool = True
    num_tokens: int = 0
    task_tokens: Mapping[str, int] = field(default_factory=dict)
    image_tokens: int = 0
    caption_dropout: float = 0.0
    draws: Mapping[str, Draw] = field(default_factory=dict)
    text: TextTokenizer | None = None

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer of its words, which must be there."""
        assert self.text is not None, f"task {self.task} reads text and has no tokenizer"
        return self.text
