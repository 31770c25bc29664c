"""Stop a run on a signal: all ranks agree between two steps, save a checkpoint, and exit with a separate code.

A scheduler sends SIGTERM or SIGUSR1 before it takes the machine away; SIGINT is a user's Ctrl-C. A signal on any rank
only sets a flag. The ranks exchange the flag before every step, so all of them stop at the same step, and they save a
checkpoint independently of the recipe's interval. A second SIGINT ends the process immediately, without saving.

A rank that is waiting for a batch when the signal arrives leaves the wait (`check_wait`). Between steps, or if it is
the only rank, it saves as above. Within a step of several ranks it cannot, because the others wait for it in a
collective: it waits at most GRACE_S longer and then exits with code LOST.
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
"""Seconds that a rank waits for a batch after a signal if it cannot leave its step without the others."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


log = logging.getLogger(__name__)


class WaitInterrupted(Exception):
    """A signal arrived while this rank waited for a batch."""


class StopRequest:
    """Handles the signals within a `with` block; only in the main thread, and not those that the process ignores."""

    def __init__(self, topology: Topology):
        self._topology = topology
        self._signal: signal.Signals | None = None  # the latest signal
        self._signal_s = 0.0  # monotonic time of the first signal
        self._previous: dict[signal.Signals, Any] = {}
        self._mask: set[Any] = set()

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            handled = [name for name in SIGNALS if signal.getsignal(name) is not signal.SIG_IGN]
            self._previous = {name: signal.signal(name, self._on_signal) for name in handled}
            # The launcher starts its ranks with SIGUSR1 blocked, so that an early one arrives here, not before.
            self._mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, handled)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._previous:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for name, handler in self._previous.items():
            signal.signal(name, handler)

    def agree(self, all_bad: bool = False) -> tuple[str | None, bool]:
        """Return the name of a signal that any rank received, and whether `all_bad` is true on any rank.

        A collective call; every rank gets the same result. Both values share one number to save a second collective: if
        there is a signal, the second value is False. This works because signal numbers are larger than 1 (True).
        """
        largest = self._topology.largest(int(self._signal or all_bad))
        return (signal.Signals(largest).name, False) if largest in SIGNALS else (None, largest > 0)

    def check_wait(self, place: str, in_step: bool) -> None:
        """Call this periodically while this rank waits for a batch, either `in_step` or between two steps.

        Raises WaitInterrupted if a signal arrived and the run can be saved, and SystemExit(LOST) if it cannot be saved
        and GRACE_S have passed since the signal.
        """
        if self._signal is None:
            return
        if not in_step or self._topology.world == 1:
            raise WaitInterrupted
        waited_s = time.monotonic() - self._signal_s
        if waited_s > GRACE_S:
            log.error(
                "rank %d: received %s %.0f s ago and is still at %s; it exits without saving. The same command "
                "resumes from the newest checkpoint",
                self._topology.rank, self._signal.name, waited_s, place,
            )  # fmt: skip
            raise SystemExit(LOST)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal is signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal is None:
            self._signal_s = time.monotonic()
        self._signal = signal.Signals(number)
