"""The files under ROOT that a report reads; each of them may be absent."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from parallel.errors import UserError
from spar_scale.evaluation.report import forms
from spar_scale.files.json_files import read_json, read_text, validated
from spar_scale.phases import declared, find


@dataclass(frozen=True)
class Run:
    """The run directory of a phase: its recipe, and one dict of metrics per logged step."""

    name: str
    stage: str
    phase: str
    recipe_text: str
    metrics: list[dict[str, Any]]

    @property
    def variant(self) -> bool:
        """Whether this is an ablation variant outside the chain, such as `tokenizer_encoder,encoder=frozen`."""
        phase = find(self.stage, self.phase)
        return self.name not in (f"{self.stage}_{self.phase}", self.stage if phase is None else phase.name)


@dataclass(frozen=True)
class ReportData:
    """The contents of all files that a report reads; absent files are empty."""

    root: Path
    runs: list[Run] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    ablation: dict[str, Any] = field(default_factory=dict)


def root_of(path: Path) -> Path:
    """Return the directory that holds the runs: `path`, or its parent if `path` is a run directory.

    Raises UserError if neither holds runs.
    """
    if not path.is_dir():
        raise UserError(
            f"{path}: no such directory; expected a run directory, or a directory that holds the runs of a chain"
        )
    root = path.resolve().parent if (path / "recipe.yaml").exists() else path
    if not _run_dirs(root):
        raise UserError(f"{path}: holds no run directory (a directory with a recipe.yaml) and is not one itself")
    return root


def read(root: Path) -> ReportData:
    """Read the files under ROOT. Raises UserError for a file that does not have the form in `forms.py`."""
    runs = [_run(folder) for folder in _run_dirs(root)]
    runs.sort(key=lambda run: (run.variant, _place(run), run.name))
    return ReportData(
        root,
        runs,
        read_scores(root),
        _read(root, "evaluation/details.json", forms.DETAILS, "evaluate {}"),
        _read(root, "training.json", forms.TRAINING, "demo --out {}"),
        _read(root, "ablation.json", forms.ABLATION, "ablate --out {}"),
    )


def read_scores(root: Path) -> dict[str, float]:
    """Return ROOT/scores.json, or {} if it is absent. Raises UserError if it is not a JSON object of numbers."""
    return _read(root, "scores.json", forms.SCORES, "evaluate {}")


def _read(root: Path, name: str, form: TypeAdapter[Any], command: str) -> dict[str, Any]:
    if not (root / name).exists():
        return {}
    remedy = f"remove it and run `spar-scale {command.format(shlex.quote(str(root)))}` to write a new one"
    return read_json(root / name, form, remedy)


def _run_dirs(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.glob("*/recipe.yaml"))


def _place(run: Run) -> int:
    """Return the position of the run's phase in the chain; unknown phases come last."""
    phase, order = find(run.stage, run.phase), declared()
    return len(order) if phase is None else order.index(phase)


def _run(folder: Path) -> Run:
    path = folder / "recipe.yaml"
    text = read_text(path)
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(recipe, dict):
        raise UserError(f"{path}: found {type(recipe).__name__}, must be the recipe of a run")
    metrics = _lines(folder / "metrics.jsonl")
    return Run(folder.name, str(recipe.get("stage")), str(recipe.get("phase")), text, metrics)


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, [] if it is absent. An incomplete last line is still in writing."""
    if not path.exists():
        return []
    text, values = read_text(path), []
    lines = text.removesuffix("\n").split("\n") if text else []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines) and not text.endswith("\n"):
                break
            raise UserError(f"{path}: line {number} is not JSON; remove this line") from None
        values.append(dict(validated(value, forms.LINE, f"{path}: line {number}", "remove this line")))
    return values
