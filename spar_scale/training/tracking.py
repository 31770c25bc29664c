"""The truth about a run, as lines of JSON that rank 0 appends.

`metrics.jsonl` has one line per step, `samples.jsonl` the sample numbers that step consumed,
`bad_samples.jsonl` those it had to leave out. At a resume all three are cut back to the checkpoint,
so what remains is the surviving lineage: no gap, no repeat. Lines are written in blocks, and forced
to disk before each checkpoint. Where they are mirrored to knows the run by `run_id`.

So a power cut damages only lines behind the newest checkpoint, and these are cut off at the resume. A damaged line of
an earlier step is refused with its number, because it cannot be made again.
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
SPARSE = "bad_samples.jsonl"  # the others have a line for every step
log = logging.getLogger(__name__)


class RunLog:
    """The three logs of one run directory, cut back to `step` completed steps when opened."""

    def __init__(self, run_dir: Path, step: int):
        self._files: dict[str, TextIO] = {}
        for name in FILES:
            _cut_back(run_dir / name, step)
            self._files[name] = open(run_dir / name, "a", encoding="utf-8")  # noqa: SIM115  (closed in close)

    def metrics(self, lines: Iterable[dict[str, Any]]) -> None:
        """Append metric lines; a value that is not finite is written as null."""
        self._append("metrics.jsonl", lines)

    def samples(self, step: int, numbers: Sequence[int]) -> None:
        """Append the sample numbers consumed by one step, as half-open ranges in ascending order."""
        self._append("samples.jsonl", [{"step": step, "ranges": ranges(numbers)}])

    def bad_samples(self, step: int, entries: Iterable[dict[str, Any]]) -> None:
        """Append the samples that could not be used."""
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
            raise UserError(f"{name} in the run directory: {error.strerror}; make room, then start again") from None


def ranges(numbers: Sequence[int]) -> list[list[int]]:
    """Sample numbers as half-open [first, end) ranges; a repeated number starts a range of its own."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1]:
            found[-1][1] += 1
        else:
            found.append([number, number + 1])
    return found


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a log; a last line torn by a kill is left out.

    Raises UserError, with the number of the line, for a whole line that is no JSON object with a step.
    """
    if not path.exists():
        return []
    found = [_parse(line) for line in path.read_bytes().split(b"\n")[:-1]]
    for number, line in enumerate(found, 1):
        if line is None:
            raise UserError(_damaged(path, number))
    return [line for line in found if line is not None]


def run_id(folder: Path, known: str | None = None) -> str:
    """The id of what a directory holds, made at the first call and kept in `folder/tracking.json`.

    `known`, out of a checkpoint, is taken where that file is missing or damaged. Of two processes that make
    a missing one at the same time, both get the one that was first.
    """
    file = folder / TRACKING
    text = json.dumps({"id": known or uuid.uuid4().hex}) + "\n"
    if not file.exists():
        temporary = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            write_file(temporary, text)
            with contextlib.suppress(FileExistsError):
                os.link(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
    if "id" not in _tracking(file):
        origin = "the id in the checkpoint" if known else "a new id, so MLflow shows it as another run"
        log.warning("warning: %s: is damaged (no JSON object with an id); it is written again with %s", file, origin)
        write_file(file, text)
    return _tracking(file)["id"]


def note_artifacts(root: Path, names: Sequence[str]) -> None:
    """Note the files of a root, by their paths in it, that belong to its parent run."""
    write_file(root / TRACKING, json.dumps({"id": run_id(root), "artifacts": list(names)}) + "\n")


def noted_artifacts(root: Path) -> list[str]:
    """The files that were noted; none where the file is missing or damaged."""
    return [str(name) for name in _tracking(root / TRACKING).get("artifacts", [])]


def _tracking(file: Path) -> dict[str, Any]:
    """The content of a tracking.json; empty where it is missing or damaged."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and isinstance(content.get("id"), str):
            return content
    return {}


def _cut_back(path: Path, step: int) -> None:
    """Keep the whole lines of steps up to `step`; replaces the file only where something goes.

    Raises UserError for a damaged line that belongs to one of these steps; a later one is named in a warning.
    """
    if not path.exists():
        return
    *whole, rest = path.read_bytes().split(b"\n")
    found = [_parse(line) for line in whole]
    damaged = [number for number, line in enumerate(found, 1) if line is None]
    kept = {number: line["step"] for number, line in enumerate(found, 1) if line is not None and line["step"] <= step}
    ends_early = path.name != SPARSE and max(kept.values(), default=0) < step
    if damaged and (ends_early or damaged[0] < max(kept, default=0)):
        raise UserError(f"{_damaged(path, damaged[0])}. The newest checkpoint is of step {step}")
    if damaged or rest:
        log.warning(
            "warning: %s: is damaged from line %d on, behind the checkpoint's step %d; cut off there",
            path, min(damaged, default=len(whole) + 1), step,
        )  # fmt: skip
    if rest or len(kept) < len(whole):
        write_file(path, b"".join(whole[number - 1] + b"\n" for number in kept))


def _parse(line: bytes) -> dict[str, Any] | None:
    """A line of a log; None where it is damaged."""
    try:
        content = json.loads(line.decode())
    except ValueError:
        return None
    return content if isinstance(content, dict) and isinstance(content.get("step"), int) else None


def _damaged(path: Path, number: int) -> str:
    return (
        f"{path}: found line {number} damaged, must be a JSON object with a step; restore the file from a copy, or "
        f"remove the line and with it what it holds (sed -i {number}d {shlex.quote(str(path))})"
    )


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return value
