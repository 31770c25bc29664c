"""Send to MLflow the metrics and artifacts that it lacks: `spar-scale track sync`, and the end of a demo.

Only missing values are sent, so the command can be interrupted and repeated.
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
    """The fields of a line of metrics.jsonl that are sent to MLflow; values that were not finite are null."""

    step: int
    time: float
    loss: float | None
    grad_norm: float | None
    lr: float | None
    samples_per_s: float | None
    terms: dict[str, float | None]


_STEP = TypeAdapter(Step)


def sync(directory: Path, uri: str | None = None) -> str:
    """Send the missing values of a run, or of all runs in a directory and its artifacts; return one line for each.

    `uri` replaces the recipes' tracking.uri. Raises UserError if there is no run or MLflow does not respond. A run that
    is training is skipped.
    """
    if _is_run(directory):
        return _send([directory], None, uri)
    runs = _runs(directory)
    if not runs:
        raise UserError(f"{directory}: found no run here; a run directory has recipe.yaml and metrics.jsonl")
    return _send(runs, directory, uri)


def log_artifacts(root: Path, files: Sequence[Path]) -> None:
    """Log files under `root` as artifacts of its parent run, and the numbers of a `scores.json` as its metrics.

    First sends the missing values of the mirrored runs in `root`; if no run is mirrored, sends nothing. A failure is
    only a warning: the files are noted, so `track sync ROOT` can send them later.
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
    lines = [_send_run(run, uri) for run in runs]
    if root is not None:
        lines.append(_send_artifacts(root, Target.of(runs[-1], load_recipe(runs[-1] / "recipe.yaml").tracking, uri)))
    return "\n".join(lines)


def _send_run(run_dir: Path, uri: str | None) -> str:
    target = Target.of(run_dir, load_recipe(run_dir / "recipe.yaml").tracking, uri)
    try:
        lock = RunLock(run_dir)
    except UserError:
        return f"{run_dir}: skipped, this run is training and sends its metrics itself"
    with lock:
        lines = _steps(run_dir / "metrics.jsonl")
        try:
            run = TrackedRun(run_dir, target)
            run.send(lines)
            run.end()
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{run_dir}: MLflow at {target.display_address} failed ({target.fault(error)})") from None
    return f"{run_dir}: {run.sent} of {len(lines)} steps sent to {target.display_address}, run {run.id}"


def _steps(path: Path) -> list[dict[str, Any]]:
    """Return the steps of metrics.jsonl. Raises UserError for a line that lacks a field of `Step`."""
    lines = read_lines(path)
    for number, line in enumerate(lines, 1):
        validated(line, _STEP, f"{path}: line {number}", "remove this line")
    return lines


def _send_artifacts(root: Path, target: Target) -> str:
    files = [root / name for name in noted_artifacts(root) if (root / name).is_file()]
    remedy = f"remove it and run `spar-scale evaluate {shlex.quote(str(root))}` to write a new one"
    scores = read_json(root / SCORES, _NUMBERS, remedy) if root / SCORES in files else {}
    try:
        store = Store(target)
        store.log_files(files)
        if scores:
            store.log_scores(scores)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{root}: MLflow at {target.display_address} failed ({target.fault(error)})") from None
    return f"{root}: {len(files)} artifacts sent to {target.display_address}, run {store.parent_id}"


def _runs(root: Path) -> list[Path]:
    """Return the runs in a directory, the last trained one last."""
    runs = [folder for folder in root.iterdir() if _is_run(folder)] if root.is_dir() else []
    return sorted(runs, key=lambda folder: (folder / "metrics.jsonl").stat().st_mtime)


def _is_run(folder: Path) -> bool:
    return (folder / "recipe.yaml").is_file() and (folder / "metrics.jsonl").is_file()
