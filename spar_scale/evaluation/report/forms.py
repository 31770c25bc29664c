"""The schema of each file that a report reads.

An optional field may be absent; the report then omits the part that shows it. Fields that the report does not read
are not checked.
"""

from __future__ import annotations

from typing import Annotated, NotRequired

from pydantic import AfterValidator, Field, TypeAdapter
from typing_extensions import TypedDict

Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=2**53)]


class Line(TypedDict):
    """A step in metrics.jsonl; values that were not finite are null."""

    step: Count
    loss: float | None
    terms: dict[str, float | None]
    skipped: NotRequired[bool]


class Spent(TypedDict, total=False):
    """Steps and time that a phase took, in training.json."""

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


class DetectedObject(TypedDict, total=False):
    """An object that the judge found in a picture."""

    shape: str
    color: str


class Drawn(TypedDict, total=False):
    """A prompt, and the objects that the judge found in the picture drawn for it."""

    prompt: str
    kind: str
    unseen: bool
    passed: bool
    found: list[DetectedObject]


class Reconstructed(TypedDict, total=False):
    """PSNR of a scene in dB, one value per tokenizer."""

    psnr: list[float]


class Edited(TypedDict, total=False):
    """An instruction, and how close the edited picture is to its target."""

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
    """The routing weights of a prompt's tokens: one row per token, one column per layer."""

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
    """The picture file of a section: rows and columns of square tiles."""

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
    """Routing maps of prompts."""

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
    """ablation.json: row -> metric -> one value per seed."""

    rows: dict[str, Metrics]


LINE = TypeAdapter(Line)
SCORES = TypeAdapter(dict[str, float])
DETAILS = TypeAdapter(Details)
TRAINING = TypeAdapter(Training)
ABLATION = TypeAdapter(Ablation)
