"""Signals that ask a run to stop: all ranks agree at the edge of a step, save there, and end with a code of its own.

SIGTERM and SIGUSR1 are what a scheduler sends before it takes the machine away, SIGINT is a person's Ctrl-C. Any of
them on any rank only sets a flag. Before every step the ranks exchange it, so none stops where others go on,
and what has been trained is saved whatever the recipe's interval. A second SIGINT ends at once, without saving.

A rank that waits for a batch when the signal comes leaves that wait (`check_wait`): between steps, or alone in its
world, it saves as above. Within a step of several ranks it cannot, as the others wait for it in a collective: there it
waits GRACE_S more and then ends with exit code LOST.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from parallel.launch.exit_codes import LOST
from parallel.topology import Topology

GRACE_S = 20.0
"""Seconds from a signal for a batch to come, where a rank cannot leave its step without the others."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


log = logging.getLogger(__name__)


class WaitInterrupted(Exception):
    """A signal asked the run to stop while it waited."""


class StopRequest:
    """Heeds the signals from `with` to its end, but those that the process ignores, and in its main thread alone."""

    def __init__(self, topology: Topology):
        self._topology = topology
        self._asked: signal.Signals | None = None
        self._asked_s = 0.0  # when
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

    def agreed(self, doubt: bool = False) -> tuple[str | None, bool]:
        """The name of a signal that any rank got, and whether any rank has a `doubt`: the same on every rank.

        A collective call, of one number: a signal goes before a doubt, which is then False.
        """
        found = self._topology.largest(int(self._asked or doubt))
        return (signal.Signals(found).name, False) if found in SIGNALS else (None, found > 0)

    def check_wait(self, place: str, in_step: bool) -> None:
        """Call again and again while this rank alone waits for something, `in_step` or between two steps.

        Raises WaitInterrupted where the run is to stop and can be saved, SystemExit(LOST) where it cannot and GRACE_S
        have passed since the signal.
        """
        if self._asked is None:
            return
        if not in_step or self._topology.world == 1:
            raise WaitInterrupted
        waited_s = time.monotonic() - self._asked_s
        if waited_s > GRACE_S:
            log.error(
                "rank %d: was asked to stop by %s %.0f s ago, and is still at %s; it ends without saving. The same "
                "command resumes from the newest checkpoint",
                self._topology.rank, self._asked.name, waited_s, place,
            )  # fmt: skip
            raise SystemExit(LOST)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._asked is signal.SIGINT:
            raise KeyboardInterrupt
        if self._asked is None:
            self._asked_s = time.monotonic()
        self._asked = signal.Signals(number)
