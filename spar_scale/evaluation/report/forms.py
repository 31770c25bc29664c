"""The form of each file that a report reads: which fields it needs, and their types.

A field that is not required may be absent, and the report then leaves out what it would show. Fields that the report
does not read are not checked.
"""

from __future__ import annotations

from typing import Annotated, NotRequired

from pydantic import AfterValidator, Field, TypeAdapter
from typing_extensions import TypedDict

Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=2**53)]


class Line(TypedDict):
    """A step in metrics.jsonl; what was not finite is null."""

    step: Count
    loss: float | None
    terms: dict[str, float | None]
    skipped: NotRequired[bool]


class Spent(TypedDict, total=False):
    """What a phase has spent, in training.json."""

    steps: Count | None
    core_seconds: Finite | None
    wall_seconds: Finite | None


class Training(TypedDict, total=False):
    """training.json."""

    command: str
    size: str
    seed: int
    machine: str
    jobs: Count
    threads: Count
    versions: dict[str, str]
    wall_seconds: Finite
    phases: dict[str, Spent]


class Seen(TypedDict, total=False):
    """An object that the judge found in a picture."""

    shape: str
    color: str


class Drawn(TypedDict, total=False):
    """A prompt, and what the judge found in the picture that was drawn for it."""

    prompt: str
    kind: str
    unseen: bool
    passed: bool
    found: list[Seen]


class Reconstructed(TypedDict, total=False):
    """PSNR of a scene in dB, one value for each tokenizer."""

    psnr: list[float]


class Edited(TypedDict, total=False):
    """An instruction, and how near the edited picture is to its target."""

    instruction: str
    kind: str
    exact: bool
    objects: bool
    psnr: float


class Asked(TypedDict, total=False):
    """A question and the answers to it."""

    type: str
    question: str
    answer: str
    before: str
    after: str
    blind: str


class Routed(TypedDict):
    """The weights of a prompt's tokens over the layers: a row for each token, a column for each layer."""

    prompt: str
    tokens: list[str]
    layers: Annotated[list[int], Field(min_length=1)]
    weights: list[list[float]]


def _rectangular(routed: Routed) -> Routed:
    shape = [len(row) for row in routed["weights"]]
    if shape != [len(routed["layers"])] * len(routed["tokens"]):
        raise ValueError("must have a weight for each token and layer")
    return routed


class Sheet(TypedDict):
    """Where the pictures of a section are: rows and columns of square tiles in one file."""

    sheet: str
    tile: Annotated[int, Field(ge=1, le=2**16)]
    columns: Annotated[list[str], Field(min_length=1)]


class DrawnSection(Sheet):
    """Pictures drawn for prompts."""

    rows: list[Drawn]


class ReconstructedSection(Sheet):
    """Reconstructions of scenes."""

    rows: list[Reconstructed]


class EditedSection(Sheet):
    """Edited pictures."""

    rows: list[Edited]


class AskedSection(Sheet):
    """Scenes with questions."""

    rows: list[Asked]


class RoutedSection(TypedDict):
    """Maps of the routing."""

    rows: list[Annotated[Routed, AfterValidator(_rectangular)]]


class Details(TypedDict, total=False):
    """evaluation/details.json."""

    generation: DrawnSection
    reconstruction: ReconstructedSection
    editing: EditedSection
    questions: AskedSection
    routes: RoutedSection


Seeds = Annotated[list[float], Field(min_length=1)]
Metrics = Annotated[dict[str, Seeds], Field(min_length=1)]


class Ablation(TypedDict):
    """ablation.json: row -> metric -> one value for each seed."""

    rows: dict[str, Metrics]


LINE = TypeAdapter(Line)
SCORES = TypeAdapter(dict[str, float])
DETAILS = TypeAdapter(Details)
TRAINING = TypeAdapter(Training)
ABLATION = TypeAdapter(Ablation)
