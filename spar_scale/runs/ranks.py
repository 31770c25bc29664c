"""Run one piece of work in several data-parallel ranks on this machine.

The ranks are forks of this process. This process does no work itself: it hosts the rendezvous store on the loopback
interface, waits for the ranks, and ends all if one fails. Each rank gets the environment variables that torchrun would
set. Only the first rank's output is shown; of the others only failures.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from parallel.errors import UserError
from parallel.launch.children import FORK, install_child_signal_handlers, killed, signals_blocked, stop
from parallel.launch.environment import rank_environment
from spar_scale.training.progress import progress_sent_to

GRACE_S = 5.0  # time for ranks to stop on a signal; shorter than the time that this process itself gets
PATIENCE_S = 2.0  # wait after a defect for the other ranks to fail too, because one of them may be the cause
POLL_S = 0.5  # interval of checking which ranks have ended
LOOPBACK = "127.0.0.1"


def run_ranks(work: Callable[[], object], num_ranks: int) -> None:
    """Run `work` in `num_ranks` concurrent processes; training runs in it show no progress.

    Raises the UserError or OSError of a rank, UserError if a rank is killed, and SystemExit if a rank has a defect (its
    traceback is printed). In all cases the other ranks are ended.
    """
    ranks: list[_Rank] = []
    store: TCPStore | None = None
    try:
        for number in range(num_ranks):
            with signals_blocked():
                ranks.append(_Rank(work, number, num_ranks))
        store = _store()  # after the forks: its server is a thread, and a fork could copy a lock that the thread holds
        for rank in ranks:
            rank.meet_at(store.port)
        _wait_for(ranks)
    finally:
        stop([rank.process for rank in ranks], GRACE_S)
        # An exception keeps this frame in a cycle. Were the store in it, the collector of a later fork would wait for
        # the server's thread, which is not there.
        store = None


@dataclass(frozen=True)
class _Defect:
    """The output for a rank that failed, and whether its failure may follow from that of another rank."""

    text: str
    follows: bool = False


class _Rank:
    """The process of one rank, and its failure."""

    def __init__(self, work: Callable[[], object], rank: int, num_ranks: int):
        self.rank = rank
        self.failure: Exception | _Defect | None = None
        self.pipe, pipe = FORK.Pipe()
        self.process: Any = FORK.Process(target=_work, args=(work, rank, num_ranks, os.getpid(), pipe))
        self.process.start()
        pipe.close()

    def meet_at(self, port: int) -> None:
        """Send the port of the store, on which the rank starts to work; does nothing if the rank has ended."""
        with contextlib.suppress(BrokenPipeError):
            self.pipe.send(port)

    def poll(self) -> bool:
        """Read the rank's failure if it has sent one; return whether it still runs."""
        code = self.process.exitcode  # read before the pipe, so that everything an ended rank has sent is received
        while self.pipe.poll():
            try:
                self.failure = self.pipe.recv()
            except (EOFError, OSError):
                break
        if code and self.failure is None:
            defect = _Defect(f"rank {self.rank} ended with exit code {code}")
            self.failure = UserError(killed(code)) if code < 0 else defect
        return code is None


def _wait_for(ranks: Sequence[_Rank]) -> None:
    """Wait for all ranks. If one fails, raise the error that is most likely the cause."""
    running, until = list(ranks), float("inf")
    defects: list[_Defect] = []
    while running and time.monotonic() < until:
        wait([file for rank in running for file in (rank.pipe, rank.process.sentinel)], timeout=POLL_S)
        running = [rank for rank in running if rank.poll()]
        for rank in ranks:
            if isinstance(rank.failure, Exception):
                raise rank.failure
        defects = [rank.failure for rank in ranks if isinstance(rank.failure, _Defect)]
        if defects:
            until = min(until, time.monotonic() + PATIENCE_S)
    if defects:
        print(min(defects, key=lambda defect: defect.follows).text, file=sys.stderr)
        raise SystemExit(1)


def _store() -> TCPStore:
    """Return a store on a free port of the loopback interface (by default TCPStore listens on all interfaces)."""
    listening = socket.create_server((LOOPBACK, 0))
    port, file = listening.getsockname()[1], listening.detach()
    return TCPStore(LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=file)


def _work(work: Callable[[], object], rank: int, num_ranks: int, parent: int, pipe: Connection) -> None:
    """Run the work in a rank's process."""
    install_child_signal_handlers(parent)
    if rank > 0:
        silence = os.open(os.devnull, os.O_WRONLY)
        for number in (1, 2):
            os.dup2(silence, number)
    code = 1
    try:
        os.environ.update(_environment(rank, num_ranks, pipe.recv()))
        with progress_sent_to(lambda *_: None):
            work()
        code = 0
    except (UserError, OSError) as error:
        pipe.send(error)
    except KeyboardInterrupt:
        code = 130
    except BaseException as error:  # gloo raises RuntimeError on a rank whose peer has ended
        pipe.send(_Defect(f"rank {rank}: {traceback.format_exc()}", isinstance(error, RuntimeError)))
    raise SystemExit(code)


def _environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun would set, for the parent's store, and gloo on the loopback interface."""
    return rank_environment(rank, num_ranks, rank, num_ranks, LOOPBACK, port) | {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "GLOO_SOCKET_IFNAME": socket.if_indextoname(1),  # the loopback's: lo, or lo0
    }
