"""One piece of work done by several data-parallel ranks on this machine.

The ranks are forks of this process, which does no work itself: it waits for them, holds the store where they
meet, on the loopback alone, and ends all where one ends badly. Each finds in its environment what torchrun
would have put there. The first rank speaks for all; of the others only a failure is shown.
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

GRACE_S = 5.0  # for ranks that are told to stop; less than this process itself is given
PATIENCE_S = 2.0  # from a defect, for the other ranks to fail too: theirs may be its cause
LOOK_S = 0.5  # between two looks at what has ended
LOOPBACK = "127.0.0.1"


def run_ranks(work: Callable[[], object], num_ranks: int) -> None:
    """Do `work` in so many processes at once; its runs show no progress.

    Raises the UserError or OSError by which a rank refuses, UserError where one is killed, SystemExit where one
    fails (its traceback is printed); the others are ended.
    """
    ranks: list[_Rank] = []
    try:
        for number in range(num_ranks):
            with signals_blocked():
                ranks.append(_Rank(work, number, num_ranks))
        store = _store()  # after the forks: its server is a thread, which none of them should have been forked amid
        for rank in ranks:
            rank.meet_at(store.port)
        _listen(ranks)
    finally:
        stop([rank.process for rank in ranks], GRACE_S)


@dataclass(frozen=True)
class _Defect:
    """What is printed of a rank that failed, and whether that may be because another had left it alone."""

    text: str
    follows: bool = False


class _Rank:
    """One rank's process, and what it has said of its failure."""

    def __init__(self, work: Callable[[], object], rank: int, num_ranks: int):
        self.rank = rank
        self.failure: Exception | _Defect | None = None
        self.pipe, pipe = FORK.Pipe()
        self.process: Any = FORK.Process(target=_work, args=(work, rank, num_ranks, os.getpid(), pipe))
        self.process.start()
        pipe.close()

    def meet_at(self, port: int) -> None:
        """Let it begin, unless it has ended already."""
        with contextlib.suppress(BrokenPipeError):
            self.pipe.send(port)

    def listen(self) -> bool:
        """Hear what it says, and return whether it still runs; how it failed is kept."""
        code = self.process.exitcode  # before it is heard: of one that has ended, all is heard
        while self.pipe.poll():
            try:
                self.failure = self.pipe.recv()
            except (EOFError, OSError):
                break
        if code and self.failure is None:
            left = _Defect(f"rank {self.rank} ended with exit code {code}")
            self.failure = UserError(killed(code)) if code < 0 else left
        return code is None


def _listen(ranks: Sequence[_Rank]) -> None:
    """Wait for all ranks; where one fails, raise what tells most of the cause."""
    running, until = list(ranks), float("inf")
    defects: list[_Defect] = []
    while running and time.monotonic() < until:
        wait([file for rank in running for file in (rank.pipe, rank.process.sentinel)], timeout=LOOK_S)
        running = [rank for rank in running if rank.listen()]
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
    """A store on a port that the system has chosen, heard by this machine only (by itself it would hear all)."""
    listening = socket.create_server((LOOPBACK, 0))
    port, file = listening.getsockname()[1], listening.detach()
    return TCPStore(LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=file)


def _work(work: Callable[[], object], rank: int, num_ranks: int, parent: int, pipe: Connection) -> None:
    """The body of a rank's process."""
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
    except BaseException as error:  # gloo's of a rank that is left alone is a RuntimeError
        pipe.send(_Defect(f"rank {rank}: {traceback.format_exc()}", isinstance(error, RuntimeError)))
    raise SystemExit(code)


def _environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """What torchrun sets, for ranks that meet at the store of their parent; gloo speaks over the loopback."""
    return rank_environment(rank, num_ranks, rank, num_ranks, LOOPBACK, port) | {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "GLOO_SOCKET_IFNAME": socket.if_indextoname(1),  # the loopback's: lo, or lo0
    }
