"""What a report reads: the files under ROOT, each of which may be absent."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from parallel.errors import UserError
from spar_scale.rules import PHASES

ORDER = [(stage, phase) for stage, names in PHASES.items() for phase in names]
"""Stage and phase, in the order of the chain."""


@dataclass(frozen=True)
class Run:
    """A phase's run directory: its recipe as it was run, one dict for each step that was logged."""

    name: str
    stage: str
    phase: str
    recipe_text: str
    metrics: list[dict[str, Any]]

    @property
    def variant(self) -> bool:
        """Whether this stands beside the chain, as a run with switches does (`tokenizer_encoder,encoder=frozen`)."""
        return self.name not in (f"{self.stage}_{self.phase}", self.stage)


@dataclass(frozen=True)
class Found:
    """Everything that a report can be made of; what is absent is empty."""

    root: Path
    runs: list[Run] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    ablation: dict[str, Any] = field(default_factory=dict)


def root_of(path: Path) -> Path:
    """Return the directory that holds the runs: `path`, or its parent if `path` is a run directory.

    Raises UserError where neither holds runs.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; it must hold the run directories of a chain, or be one")
    root = path.resolve().parent if (path / "recipe.yaml").exists() else path
    if not _run_dirs(root):
        raise UserError(f"{path}: holds no run directory (one with a recipe.yaml), and is none itself")
    return root


def read(root: Path) -> Found:
    """Read what there is under ROOT. Raises UserError for a file that is no JSON or YAML of the kind expected."""
    runs = [_run(folder) for folder in _run_dirs(root)]
    runs.sort(key=lambda run: (run.variant, _place(run), run.name))
    return Found(
        root,
        runs,
        {name: value for name, value in _json(root / "scores.json").items() if isinstance(value, int | float)},
        _json(root / "evaluation" / "details.json"),
        _json(root / "training.json"),
        _json(root / "ablation.json"),
    )


def _run_dirs(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.glob("*/recipe.yaml"))


def _place(run: Run) -> int:
    """Where the run's phase stands in the chain; behind it if it is no phase of ours."""
    known = (run.stage, run.phase) in ORDER
    return ORDER.index((run.stage, run.phase)) if known else len(ORDER)


def _run(folder: Path) -> Run:
    path = folder / "recipe.yaml"
    text = _text(path)
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(recipe, dict):
        raise UserError(f"{path}: found {type(recipe).__name__}, must be the recipe of a run")
    metrics = _lines(folder / "metrics.jsonl")
    return Run(folder.name, str(recipe.get("stage")), str(recipe.get("phase")), text, metrics)


def _json(path: Path) -> dict[str, Any]:
    """The JSON object of a file, empty if the file is absent."""
    if not path.exists():
        return {}
    try:
        value = json.loads(_text(path))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: found {type(value).__name__}, must be a JSON object")
    return value


def _lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file, none if it is absent. The last line may still be in writing."""
    if not path.exists():
        return []
    lines, values = _text(path).splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            values.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise UserError(f"{path}: line {number} is not JSON") from None
    return values


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
