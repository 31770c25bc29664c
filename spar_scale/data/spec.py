"""What a training stage asks of the data: the tensors of one sample and its random draws.

Every draw is keyed by (seed, purpose, sample number), so it is the same on whatever rank, worker or
layout the sample is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Draw:
    """A random tensor that a sample carries: its shape without batch, and its distribution."""

    shape: tuple[int, ...]
    distribution: Literal["normal", "uniform"]


@dataclass(frozen=True)
class SampleSpec:
    """The sample a stage trains on.

    `task` names the decoder, or a mixture of decoders, one for each source; `image_size` is the side in
    pixels of the square image; `crop` and `flip` are the augmentations; `num_tokens` is the length of
    the text, `task_tokens` that of each language task; `image_tokens` is how many tokens stand for a
    picture; `caption_dropout` is the share of samples whose caption gives way to the bare instruction;
    `draws` maps a slot name to the random tensor it carries, fp32.
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
