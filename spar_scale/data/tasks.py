"""What each task makes of a sample: the registry that `SampleSpec.task` names.

A task lists the tensors of one sample and fills them from the members of the tar. Its random draws
come from `draws(purpose)`, keyed by (seed, purpose, sample number), never from a worker's state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from parallel.errors import UserError, nearest
from spar_scale.data.images import EXTENSIONS, BadSample, decode, square
from spar_scale.data.spec import SampleSpec

Draws = Callable[[str], np.random.Generator]
Slots = dict[str, tuple[tuple[int, ...], type]]  # name -> shape without batch, numpy type


@dataclass(frozen=True)
class Members:
    """The members of one sample, read when asked for."""

    extensions: tuple[str, ...]
    read: Callable[[str], bytes]

    def first(self, wanted: Iterable[str]) -> bytes:
        """Return the first wanted member that is there; raise BadSample where none is."""
        wanted = tuple(wanted)
        for extension in wanted:
            if extension in self.extensions:
                return self.read(extension)
        raise BadSample(f"no member {'|'.join(wanted)}; the sample has {', '.join(self.extensions)}")


@dataclass(frozen=True)
class Task:
    """`slots(spec)` are the tensors of one sample, `fill(members, spec, draws)` their values."""

    slots: Callable[[SampleSpec], Slots]
    fill: Callable[[Members, SampleSpec, Draws], Mapping[str, np.ndarray]]


def find_task(name: str) -> Task:
    """Return the task of a name; an unknown one raises UserError."""
    if name not in TASKS:
        raise UserError(f"sample.task is '{name}'; known: {', '.join(TASKS)}{nearest(name, TASKS)}")
    return TASKS[name]


def _image_slots(spec: SampleSpec) -> Slots:
    return {"images": ((3, spec.image_size, spec.image_size), np.float32)}


def _image(members: Members, spec: SampleSpec, draws: Draws) -> dict[str, np.ndarray]:
    """The picture alone; of an editing triplet the output, where the plain name is missing."""
    picture = decode(members.first((*EXTENSIONS, *(f"output.{extension}" for extension in EXTENSIONS))))
    along = float(draws("crop").random()) if spec.crop == "random" else 0.5
    mirrored = spec.flip and bool(draws("flip").random() < 0.5)
    return {"images": square(picture, spec.image_size, along, mirrored)}


TASKS = {"images": Task(_image_slots, _image)}
