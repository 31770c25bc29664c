"""The sources of a run, and the specification of its samples: the tensors of one sample and its random draws.

Every draw is keyed by (seed, purpose, sample number), so it does not depend on the rank, worker or layout that loads
the sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from parallel.errors import UserError
from spar_scale.data.storage import expand_shards

if TYPE_CHECKING:
    from spar_scale.config.recipe import Recipe
    from spar_scale.data.text import TextTokenizer

Fit = Literal["crop", "stretch"]


@dataclass(frozen=True)
class Source:
    """A set of shards with its weight in the mixture; the fields are those of `data.sources` in a recipe.

    `task` is None where the source's name is its task; `texts` are the members that hold its captions, () by default.
    """

    name: str
    shards: str | Sequence[str]
    weight: float = 1.0
    task: str | None = None
    texts: tuple[str, ...] = ()
    fit: Fit = "crop"


def sources_of(recipe: Recipe) -> list[Source]:
    """Return the sources of a recipe, in its order."""
    return [
        Source(one.name, one.shards, one.weight, one.task, tuple(one.text or ()), one.fit)
        for one in recipe.data.sources
    ]


def shards_of(sources: Sequence[Source]) -> list[tuple[Source, list[str]]]:
    """Return each source with its shards, sorted. Raises UserError, which names the source, if one has none."""
    found = []
    for source in sources:
        try:
            found.append((source, expand_shards(source.shards)))
        except UserError as error:
            raise UserError(f"data.sources: source '{source.name}': shards: {error}") from None
    return found


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
    the tokenizer of its prompts; `long_captions` is what becomes of a caption that makes a prompt too long. `texts` and
    `fit` are those of a source: `of_source` sets them.
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
    long_captions: Literal["cut", "refuse"] = "cut"
    texts: tuple[str, ...] = ()
    fit: Fit = "crop"

    def of_source(self, source: Source) -> SampleSpec:
        """Return the specification of the samples of one source."""
        return replace(self, texts=source.texts, fit=source.fit)

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer of its words, which must be there."""
        assert self.text is not None, f"task {self.task} reads text and has no tokenizer"
        return self.text
