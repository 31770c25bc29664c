"""Measure the core-seconds and wall-seconds of a piece of work, summed over all attempts.

Core-seconds are the CPU time of the process that does the work and of all its child processes. getrusage counts a child
only after it was waited for, so the CPU times of running children (ranks, loader workers) are added. The sums are in a
file in the work's folder, which is written at every log step, so SIGKILL loses at most the time of one log step.
"""

from __future__ import annotations

import json
import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from parallel.files import write_file

FILE = "spent.json"


@dataclass(frozen=True)
class Spent:
    """Seconds of all attempts at one piece of work, and whether one of them finished it."""

    core_seconds: float = 0.0
    wall_seconds: float = 0.0
    finished: bool = False


class Spending:
    """Adds the time that this process spends from now on to that of earlier attempts in `folder`."""

    def __init__(self, folder: Path):
        self._folder, self._before = folder, read_spending(folder)
        self._cores, self._clock = core_seconds(), time.monotonic()

    def record(self, finished: bool = False) -> Spent:
        """Write the sums up to now, and return them."""
        now = Spent(
            round(self._before.core_seconds + core_seconds() - self._cores, 2),
            round(self._before.wall_seconds + time.monotonic() - self._clock, 2),
            finished,
        )
        _write(self._folder, now)
        return now


def read_spending(folder: Path) -> Spent:
    """Return the time of the attempts in `folder`, zero if there is no record."""
    try:
        return Spent(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # a damaged record must not stop the work
        return Spent()


def unfinish(folder: Path) -> None:
    """Note that the work in `folder` must be done again."""
    if (folder / FILE).exists():
        _write(folder, Spent(**{**asdict(read_spending(folder)), "finished": False}))


def core_seconds() -> float:
    """Return the CPU seconds, user and system, of this process and all its child processes."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages) + sum(
        map(_alive, psutil.Process().children(recursive=True))
    )


def _alive(child: psutil.Process) -> float:
    """Return the CPU seconds of a running child and of the children that it waited for; 0 if it has just ended."""
    try:
        return sum(child.cpu_times()[:4])  # user, system, children's user, children's system
    except psutil.Error:
        return 0.0


def _write(folder: Path, now: Spent) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / FILE, (json.dumps(asdict(now)) + "\n"))
