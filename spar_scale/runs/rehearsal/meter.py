"""Measure a piece of work that forks processes: wall seconds, core-seconds, and the memory of all processes together.

A process of its own looks at the memory twice a second, because forks must not happen beside a thread. A page that
several processes share counts once (Linux's proportional set size); where the kernel does not tell that, once for each.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

import psutil

from parallel.launch.children import FORK, install_child_signal_handlers, signals_blocked, stop
from spar_scale.runs.spending import core_seconds

INTERVAL_S = 0.5


@dataclass
class Measured:
    """What a piece of work took."""

    wall_s: float = 0.0
    core_s: float = 0.0
    peak_bytes: int = 0


class Meter:
    """A process that measures the memory of its parent and of all the parent's other children."""

    def __init__(self) -> None:
        self._pipe, pipe = FORK.Pipe()
        with signals_blocked():
            self._process = FORK.Process(target=_watch, args=(os.getpid(), pipe))
            self._process.start()
        pipe.close()

    @contextmanager
    def measure(self) -> Iterator[Measured]:
        """Yield what is measured; its values are there when the context ends."""
        found, began, cores = Measured(), time.monotonic(), core_seconds()
        self._peak()
        try:
            yield found
        finally:
            found.wall_s, found.core_s = time.monotonic() - began, core_seconds() - cores
            found.peak_bytes = self._peak()

    def close(self) -> None:
        """End the process."""
        stop([self._process], 1.0)

    def _peak(self) -> int:
        """Return the largest sum since the last call."""
        self._pipe.send(None)
        return self._pipe.recv()


def _watch(parent: int, pipe: Connection) -> None:
    install_child_signal_handlers(parent)
    with contextlib.suppress(KeyboardInterrupt, EOFError):
        _answer(psutil.Process(parent), pipe)


def _answer(root: psutil.Process, pipe: Connection) -> None:
    """Look at the memory until a request comes; answer it with the largest sum since the last one."""
    peak = 0
    while True:
        resident = 0
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [root, *root.children(recursive=True)]:
                if process.pid != os.getpid():
                    with contextlib.suppress(psutil.Error):
                        resident += _size(process)
        peak = max(peak, resident)
        if pipe.poll(INTERVAL_S):
            pipe.recv()
            pipe.send(peak)
            peak = 0


def _size(process: psutil.Process) -> int:
    """Return the bytes of memory that are a process's own, and its share of what it shares."""
    try:
        with open(f"/proc/{process.pid}/smaps_rollup", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))
    except (OSError, StopIteration):  # it has ended, or this is no Linux
        return process.memory_info().rss
