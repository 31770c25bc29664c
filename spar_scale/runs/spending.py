"""What a piece of work has cost so far: core-seconds and wall-seconds, over all its attempts.

Core-seconds are the CPU time of the process that does the work and of every process it starts: getrusage of both
counts a child only once it has been waited for, so those that still live (ranks, the loader's) are read as well.
The sums lie in a file beside the work and are written at every log step, so SIGKILL loses at most one of those.
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
    """Seconds over all attempts at one piece of work, and whether one of them came to its end."""

    core_seconds: float = 0.0
    wall_seconds: float = 0.0
    finished: bool = False


class Spending:
    """Adds what this process spends from here on to what earlier attempts in `folder` have spent."""

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
    """What attempts in `folder` have spent; nothing where none has said so."""
    try:
        return Spent(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # an accountant does not stop the work
        return Spent()


def unfinish(folder: Path) -> None:
    """Note that the work in `folder` is to be done again."""
    if (folder / FILE).exists():
        _write(folder, Spent(**{**asdict(read_spending(folder)), "finished": False}))


def core_seconds() -> float:
    """CPU seconds, user and system, of this process and of all it has started."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages) + sum(
        map(_alive, psutil.Process().children(recursive=True))
    )


def _alive(child: psutil.Process) -> float:
    """CPU seconds of a living child and of those that it has waited for; 0 where it has just ended."""
    try:
        return sum(child.cpu_times()[:4])  # user, system, children's user, children's system
    except psutil.Error:
        return 0.0


def _write(folder: Path, now: Spent) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / FILE, (json.dumps(asdict(now)) + "\n"))
