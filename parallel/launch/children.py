"""Child processes that end with their parent, and that only the parent stops.

Ctrl-C sends SIGINT to all processes of a terminal. Only the first process handles it; it stops its children with
SIGTERM, and they stop theirs. If a parent is killed, the kernel kills its children (on Linux).
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

FORK = multiprocessing.get_context("fork")
KILLED_S = 5.0  # longest wait for a killed process: one that is blocked by a hanging disk does not end
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block SIGINT and SIGTERM, so that none arrives between the start of a child and its registration in a list."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Within the context, SIGTERM raises KeyboardInterrupt as Ctrl-C does; only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def install_child_signal_handlers(parent: int) -> None:
    """Prepare a child that was started within `signals_blocked`.

    It ends with process `parent`, ignores SIGINT, and raises KeyboardInterrupt on SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    end_with_parent()
    if sys.platform == "linux" and os.getppid() != parent:
        raise SystemExit(1)


def end_with_parent() -> None:
    """Make the kernel kill this process when its parent ends for any reason (only on Linux)."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # prctl's PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def stop(children: Iterable[Any], grace_s: float) -> None:
    """End the children that still run: by SIGTERM, so that they can record their time, and after `grace_s` by SIGKILL.

    Signals are ignored meanwhile: it takes at most `grace_s`, and KILLED_S more if the system hangs.
    """
    before = {name: signal.signal(name, signal.SIG_IGN) for name in _SIGNALS}
    try:
        running = list(children)
        for child in running:
            child.terminate()
        until = time.monotonic() + grace_s
        for child in running:
            child.join(max(0.0, until - time.monotonic()))
            if child.exitcode is None:
                child.kill()
                child.join(KILLED_S)
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def killed(code: int) -> str:
    """Return the error message for a process that was ended by a signal (a negative exit code)."""
    return (
        f"its process was ended by {signal.Signals(-code).name}; where memory has run out,"
        " --jobs 1 needs half of it. The same command resumes from here"
    )
