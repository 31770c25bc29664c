"""Forks that live no longer than the process that made them, and that it alone may stop.

Ctrl-C reaches all processes of a terminal: the first of them answers it, and asks its children to end by SIGTERM,
which they in turn do. SIGKILL of a parent ends its children (by the kernel, where that is Linux).
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
KILLED_S = 5.0  # for a killed process to end: one that waits for a disk which hangs does not
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Within it neither Ctrl-C nor SIGTERM comes between the start of a child and its place in a list."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Within it SIGTERM raises KeyboardInterrupt, as Ctrl-C does; in the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def install_child_signal_handlers(parent: int) -> None:
    """In a child that was started `signals_blocked`: end with process `parent`; SIGTERM raises KeyboardInterrupt."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    end_with_parent()
    if sys.platform == "linux" and os.getppid() != parent:
        raise SystemExit(1)


def end_with_parent() -> None:
    """Be killed when the process that started this one ends, however it ends; on Linux alone."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # prctl's PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def stop(children: Iterable[Any], grace_s: float) -> None:
    """End those that still run: asked first, so that they note what they have spent, after `grace_s` killed.

    Signals that come meanwhile are ignored: it takes `grace_s` at most, and KILLED_S where the system hangs.
    """
    before = {name: signal.signal(name, signal.SIG_IGN) for name in _SIGNALS}
    try:
        asked = list(children)
        for child in asked:
            child.terminate()
        until = time.monotonic() + grace_s
        for child in asked:
            child.join(max(0.0, until - time.monotonic()))
            if child.exitcode is None:
                child.kill()
                child.join(KILLED_S)
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def killed(code: int) -> str:
    """What to say of a process whose exit code is a signal's, negative."""
    return (
        f"its process was ended by {signal.Signals(-code).name}; where memory has run out,"
        " --jobs 1 needs half of it. The same command resumes from here"
    )
