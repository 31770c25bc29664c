"""The logs of a run: JSON lines that rank 0 appends, and the id under which they are mirrored to MLflow.

`metrics.jsonl` has one line per step, `samples.jsonl` the sample numbers that the step consumed, `bad_samples.jsonl`
its bad samples. On resume all three are truncated to the checkpoint's step, so the steps have no gap and no repeat.
Lines are written in blocks and forced to disk before each checkpoint.

So a power failure damages only lines after the newest checkpoint, which are removed on resume. A damaged line of an
earlier step is refused with its number, because it cannot be restored.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shlex
import threading
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from parallel.errors import UserError
from parallel.files import write_file

TRACKING = "tracking.json"
FILES = ("metrics.jsonl", "samples.jsonl", "bad_samples.jsonl")
SPARSE = "bad_samples.jsonl"  # the only file without a line for every step
log = logging.getLogger(__name__)


class RunLog:
    """The three logs of one run directory, truncated to `step` completed steps when opened."""

    def __init__(self, run_dir: Path, step: int):
        self._files: dict[str, TextIO] = {}
        for name in FILES:
            _truncate(run_dir / name, step)
            self._files[name] = open(run_dir / name, "a", encoding="utf-8")  # noqa: SIM115  (closed in close)

    def metrics(self, lines: Iterable[dict[str, Any]]) -> None:
        """Append metric lines; a value that is not finite is written as null."""
        self._append("metrics.jsonl", lines)

    def samples(self, step: int, numbers: Sequence[int]) -> None:
        """Append the sample numbers consumed by one step, as half-open ranges in ascending order."""
        self._append("samples.jsonl", [{"step": step, "ranges": ranges(numbers)}])

    def bad_samples(self, step: int, entries: Iterable[dict[str, Any]]) -> None:
        """Append the bad samples of one step."""
        self._append("bad_samples.jsonl", [{"step": step, **entry} for entry in entries])

    def flush(self) -> None:
        """Force everything to disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        for file in self._files.values():
            file.close()

    def _append(self, name: str, lines: Iterable[dict[str, Any]]) -> None:
        try:
            for line in lines:
                self._files[name].write(json.dumps(_finite(line), allow_nan=False) + "\n")
            self._files[name].flush()
        except OSError as error:
            raise UserError(
                f"{name} in the run directory: {error.strerror}; free disk space, then start again"
            ) from None


def ranges(numbers: Sequence[int]) -> list[list[int]]:
    """Return sample numbers as half-open [first, end) ranges; a repeated number starts its own range."""
    intervals: list[list[int]] = []
    for number in sorted(numbers):
        if intervals and number == intervals[-1][1]:
            intervals[-1][1] += 1
        else:
            intervals.append([number, number + 1])
    return intervals


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return all complete lines of a log, without an incomplete last line (after a kill).

    Raises UserError, with the line number, for a complete line that is not a JSON object with a step.
    """
    if not path.exists():
        return []
    lines = [_parse(line) for line in path.read_bytes().split(b"\n")[:-1]]
    for number, line in enumerate(lines, 1):
        if line is None:
            raise UserError(_damaged(path, number))
    return [line for line in lines if line is not None]


def run_id(folder: Path, known: str | None = None) -> str:
    """Return the id of a run directory, or of a directory of runs; the first call creates `folder/tracking.json`.

    `known`, the id in a checkpoint, is used if that file is missing or damaged. If two processes create the file at the
    same time, both get the same id.
    """
    file = folder / TRACKING
    text = json.dumps({"id": known or uuid.uuid4().hex}) + "\n"
    if not file.exists():
        temporary = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            write_file(temporary, text)
            with contextlib.suppress(FileExistsError):  # a rename would replace the other process's id, a link fails
                os.link(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
    if "id" not in _tracking(file):
        origin = "the id in the checkpoint" if known else "a new id, so MLflow shows it as another run"
        log.warning("warning: %s: is damaged (not a JSON object with an id); written again with %s", file, origin)
        write_file(file, text)
    return _tracking(file)["id"]


def note_artifacts(root: Path, names: Sequence[str]) -> None:
    """Note which files of a directory of runs, by relative path, are artifacts of its parent run."""
    write_file(root / TRACKING, json.dumps({"id": run_id(root), "artifacts": list(names)}) + "\n")


def noted_artifacts(root: Path) -> list[str]:
    """Return the noted artifacts, [] if the file is missing or damaged."""
    return [str(name) for name in _tracking(root / TRACKING).get("artifacts", [])]


def _tracking(file: Path) -> dict[str, Any]:
    """Return the content of a tracking.json, {} if it is missing or damaged."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and isinstance(content.get("id"), str):
            return content
    return {}


def _truncate(path: Path, step: int) -> None:
    """Keep the complete lines of steps up to `step`; replace the file only if a line is removed.

    Raises UserError for a damaged line of one of these steps; a damaged later line gives a warning.
    """
    if not path.exists():
        return
    *complete, rest = path.read_bytes().split(b"\n")
    lines = [_parse(line) for line in complete]
    damaged = [number for number, line in enumerate(lines, 1) if line is None]
    kept = {number: line["step"] for number, line in enumerate(lines, 1) if line is not None and line["step"] <= step}
    # A damaged line has no step to read. It belongs to a kept step if a kept line follows it, or the last step is
    # missing.
    ends_early = path.name != SPARSE and max(kept.values(), default=0) < step
    if damaged and (ends_early or damaged[0] < max(kept, default=0)):
        raise UserError(f"{_damaged(path, damaged[0])}. The newest checkpoint is of step {step}")
    if damaged or rest:
        log.warning(
            "warning: %s: is damaged from line %d on, after the checkpoint's step %d; truncated there",
            path, min(damaged, default=len(complete) + 1), step,
        )  # fmt: skip
    if rest or len(kept) < len(complete):
        write_file(path, b"".join(complete[number - 1] + b"\n" for number in kept))


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the content of a log line, or None if it is damaged."""
    try:
        content = json.loads(line.decode())
    except ValueError:
        return None
    return content if isinstance(content, dict) and isinstance(content.get("step"), int) else None


def _damaged(path: Path, number: int) -> str:
    return (
        f"{path}: line {number} is damaged, expected a JSON object with a step; restore the file from a copy, or "
        f"remove the line and lose its content (sed -i {number}d {shlex.quote(str(path))})"
    )


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return value
