"""What runs and their root still owe to MLflow, sent in one go: `spar-scale track sync`, and the end of a demo.

Sending again sends what is missing, so this may be repeated, and stopped anywhere.
"""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from parallel.errors import UserError
from parallel.launch.run_lock import RunLock
from spar_scale.config.recipe import load_recipe
from spar_scale.files.json_files import read_json, validated
from spar_scale.training.mlflow_store import Store, Target, TrackedRun, load_mlflow
from spar_scale.training.tracking import note_artifacts, noted_artifacts, read_lines

SCORES = "scores.json"
_NUMBERS = TypeAdapter(dict[str, float])
_log = logging.getLogger(__name__)


class Step(TypedDict):
    """What MLflow is sent of a line of metrics.jsonl; what was not finite is null."""

    step: int
    time: float
    loss: float | None
    grad_norm: float | None
    lr: float | None
    samples_per_s: float | None
    terms: dict[str, float | None]


_STEP = TypeAdapter(Step)


def sync(directory: Path, uri: str | None = None) -> str:
    """Send what is missing of a run, or of all runs in a directory with its artifacts; one line on each.

    `uri` stands in for the recipes' tracking.uri. Raises UserError where there is no run, or MLflow
    does not answer. A run in training is left out.
    """
    if _is_run(directory):
        return _send([directory], None, uri)
    runs = _runs(directory)
    if not runs:
        raise UserError(f"{directory}: found no run here; a run directory has recipe.yaml and metrics.jsonl")
    return _send(runs, directory, uri)


def log_artifacts(root: Path, files: Sequence[Path]) -> None:
    """Log files under `root` as artifacts of its parent run, and the numbers of a `scores.json` as its metrics.

    First sends what the mirrored runs in `root` still owe; where no run is mirrored, nothing is sent. A
    failure is a warning, and `track sync ROOT` sends these files too.
    """
    noted = [*noted_artifacts(root), *(os.path.relpath(file, root) for file in files)]
    runs = [run for run in _runs(root) if load_recipe(run / "recipe.yaml").tracking.mirror]
    if not runs:
        return
    note_artifacts(root, list(dict.fromkeys(noted)))
    try:
        _log.info("%s", _send(runs, root, None).rpartition("\n")[2])
    except (UserError, OSError) as error:
        _log.warning("warning: %s. `spar-scale track sync %s` sends what is missing", error, root)


def _send(runs: Sequence[Path], root: Path | None, uri: str | None) -> str:
    try:
        load_mlflow()
    except ImportError as error:
        raise UserError(f"{error}; install mlflow") from None
    said = [_send_run(run, uri) for run in runs]
    if root is not None:
        said.append(_send_artifacts(root, Target.of(runs[-1], load_recipe(runs[-1] / "recipe.yaml").tracking, uri)))
    return "\n".join(said)


def _send_run(run_dir: Path, uri: str | None) -> str:
    target = Target.of(run_dir, load_recipe(run_dir / "recipe.yaml").tracking, uri)
    try:
        lock = RunLock(run_dir)
    except UserError:
        return f"{run_dir}: left out, it is in training and sends for itself"
    with lock:
        lines = _steps(run_dir / "metrics.jsonl")
        try:
            run = TrackedRun(run_dir, target)
            run.send(lines)
            run.end()
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{run_dir}: MLflow at {target.shown} failed ({target.fault(error)})") from None
    return f"{run_dir}: {run.sent} of {len(lines)} steps sent to {target.shown}, run {run.id}"


def _steps(path: Path) -> list[dict[str, Any]]:
    """The steps of metrics.jsonl. Raises UserError for a line without what MLflow is sent of a step."""
    lines = read_lines(path)
    for number, line in enumerate(lines, 1):
        validated(line, _STEP, f"{path}: line {number}", "remove this line")
    return lines


def _send_artifacts(root: Path, target: Target) -> str:
    files = [root / name for name in noted_artifacts(root) if (root / name).is_file()]
    remedy = f"remove it, then `spar-scale evaluate {shlex.quote(str(root))}` writes a new one"
    scores = read_json(root / SCORES, _NUMBERS, remedy) if root / SCORES in files else {}
    try:
        store = Store(target)
        store.log_files(files)
        if scores:
            store.log_scores(scores)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{root}: MLflow at {target.shown} failed ({target.fault(error)})") from None
    return f"{root}: {len(files)} artifacts sent to {target.shown}, run {store.parent_id}"


def _runs(root: Path) -> list[Path]:
    """The runs in a directory, the one last trained at the end."""
    found = [folder for folder in root.iterdir() if _is_run(folder)] if root.is_dir() else []
    return sorted(found, key=lambda folder: (folder / "metrics.jsonl").stat().st_mtime)


def _is_run(folder: Path) -> bool:
    return (folder / "recipe.yaml").is_file() and (folder / "metrics.jsonl").is_file()
