"""Signals that ask a run to stop: all ranks agree at the edge of a step, save there, and end with a code of its own.

SIGTERM and SIGUSR1 are what a scheduler sends before it takes the machine away, SIGINT is a person's Ctrl-C. Any of
them on any rank only sets a flag. At the edge of every step the ranks exchange it, so none stops where others go on,
and what has been trained is saved whatever the recipe's interval. A second SIGINT ends at once, without saving.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from parallel.topology import Topology

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Heeds the signals from `with` to its end, but those that the process ignores, and in its main thread alone."""

    def __init__(self, topology: Topology):
        self._topology = topology
        self._asked: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._mask: set[Any] = set()

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            heard = [name for name in SIGNALS if signal.getsignal(name) is not signal.SIG_IGN]
            self._before = {name: signal.signal(name, self._note) for name in heard}
            self._mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, heard)  # a launcher has kept SIGUSR1 until now
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._before:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def agreed(self) -> str | None:
        """What asked any rank to stop, in words, the same on every rank; None where nothing did. A collective call."""
        mine = 0 if self._asked is None else int(self._asked)
        found = self._topology.largest(mine)
        return signal.Signals(found).name if found else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._asked is signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = signal.Signals(number)
