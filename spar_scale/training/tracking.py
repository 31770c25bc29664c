"""The truth about a run, as lines of JSON that rank 0 appends.

`metrics.jsonl` has one line per step, `samples.jsonl` the sample numbers that step consumed,
`bad_samples.jsonl` those it had to leave out. At a resume all three are cut back to the checkpoint,
so what remains is the surviving lineage: no gap, no repeat. Lines are written in blocks, and forced
to disk before each checkpoint. Where they are mirrored to knows the run by `run_id`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from parallel.errors import UserError
from parallel.files import write_file

TRACKING = "tracking.json"
FILES = ("metrics.jsonl", "samples.jsonl", "bad_samples.jsonl")


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
    """All whole lines of a log; a last line torn by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def run_id(folder: Path, known: str | None = None) -> str:
    """The id of what a directory holds, made at the first call and kept in `folder/tracking.json`.

    `known`, out of a checkpoint, is taken where that file is not there. Of two processes that make
    one at the same time, both get the one that was first.
    """
    file = folder / TRACKING
    if not file.exists():
        temporary = _write_beside(file, {"id": known or uuid.uuid4().hex})
        with contextlib.suppress(FileExistsError):
            os.link(temporary, file)
        temporary.unlink()
    return json.loads(file.read_text(encoding="utf-8"))["id"]


def note_artifacts(root: Path, names: Sequence[str]) -> None:
    """Note the files of a root, by their paths in it, that belong to its parent run."""
    write_file(root / TRACKING, json.dumps({"id": run_id(root), "artifacts": list(names)}) + "\n")


def noted_artifacts(root: Path) -> list[str]:
    """The files that were noted."""
    file = root / TRACKING
    return json.loads(file.read_text(encoding="utf-8")).get("artifacts", []) if file.exists() else []


def _write_beside(file: Path, content: dict[str, Any]) -> Path:
    temporary = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
    temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    return temporary


def _cut_back(path: Path, step: int) -> None:
    """Keep the whole lines of steps up to `step`; replaces the file only where something goes."""
    if not path.exists():
        return
    kept = [json.dumps(line) + "\n" for line in read_lines(path) if line["step"] <= step]
    text = "".join(kept)
    if text != path.read_text(encoding="utf-8"):
        write_file(path, text)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return value
