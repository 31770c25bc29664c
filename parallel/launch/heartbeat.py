"""Detect ranks that died or hang: every rank sends a heartbeat, and a run that cannot continue ends with a named cause.

Once a second, a thread of each rank publishes in the rendezvous store where the rank is in the run and how many
collectives it has started in each process group. Rank 0 reads the beats of all ranks, the others read that of rank 0. A
rank is to blame in three cases. It sends no beat for `timeout_s` (it was killed or stopped, or its node is gone). It is
late: another rank started a collective `timeout_s` ago that this rank has not started. Or it failed. Every rank prints
the same message about it, a late rank also prints its stacks, and all ranks end. So a step, a save or a load may take
any time if no rank waits for another, and a waiting rank is never mistaken for the rank that it waits for.

The process ends with os._exit, because its main thread may be inside a collective, in C, where no exception reaches it,
and a normal exit would wait for the same collective. The cost per step is setting one attribute. Sending and watching
are two threads, because sending blocks if the store does. Waits between pipeline stages start no collective, so they
are not detected here: the backend times out a little later, and then the ranks that have not failed are reported.

It is our own code, because torch's watchdog only supports NCCL and names no rank. It uses private names of torch 2.13:
`_get_default_store`, `_world`, `_get_sequence_number_for_group`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import faulthandler
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from parallel.errors import UserError
from parallel.launch.exit_codes import LOST
from parallel.topology import Topology

PERIOD_S = 1.0
"""Seconds between two beats."""
WAITING = "waiting for a batch"
"""Suffix of a place at which a rank waits for data."""
PATIENCE_S = 5.0
"""After a failure, the other ranks have this time to end themselves; a rank without beats for this long is dead."""

_runs = itertools.count()  # distinguishes the runs of one process in the store; all ranks make the same runs


@dataclass(frozen=True)
class Beat:
    """The beat of a rank: its place, the number of collectives started by group, and its failure.

    `left` is None while the rank runs, "" after a normal end, else its error. `follows` means that the error probably
    follows from the failure of another rank.
    """

    place: str
    begun: Mapping[str, int] = field(default_factory=dict)
    left: str | None = None
    follows: bool = False


@dataclass
class Seen:
    """The last beat of a rank, and the watcher's times at which it was last received and last changed."""

    beat: Beat
    heard_s: float
    moved_s: float


class Heartbeat:
    """Watches the other ranks and this rank's own waits for data, within a `with` block.

    The run sets `place`, a text that can follow "at"; a place that ends in WAITING is a wait for data. `timeout_s` is
    the longest time that a rank may wait for another rank or for data.
    """

    def __init__(self, topology: Topology, timeout_s: float):
        self._place, self._places = "its start", 0
        self._topology, self._timeout_s, self._rank = topology, timeout_s, topology.rank
        self._watched: Sequence[int] = range(1, topology.world) if topology.rank == 0 else [0]
        self._beats: dict[int, str] = {}  # rank -> its last beat as JSON
        self._verdict: dict[int, str] = {}  # rank to blame -> its fault
        self._left: str | None = None
        self._follows = False
        self._stop, self._named = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []

    @property
    def place(self) -> str:
        """The current place of the run."""
        return self._place

    @place.setter
    def place(self, place: str) -> None:
        self._place = place
        self._places += 1  # distinguishes two waits at the same place

    def __enter__(self) -> Heartbeat:
        self._threads = [threading.Thread(target=self._watch_own_waits, daemon=True)]
        if self._topology.world > 1:
            self._key = f"heartbeat/{next(_runs)}"
            default_store: Any = distributed_c10d._get_default_store()
            self._store = default_store.clone()  # a separate connection: the run's own may be blocked in a wait
            self._store.set_timeout(datetime.timedelta(seconds=self._timeout_s))
            self._store.set(f"{self._key}/{self._rank}", self._encode_beat(0))
            if self._rank == 0:
                self._store.set(f"{self._key}/verdict", "{}")
            name = f"rank {self._rank} (host {socket.gethostname()}, pid {os.getpid()})"
            self._names: list[str] = self._topology.gather(name)  # after this, the store has a beat of every rank
            self._threads += [
                threading.Thread(target=body, daemon=True) for body in (self._exchange_beats, self._watch)
            ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._follows = isinstance(error, RuntimeError) and bool(re.search("gloo|nccl", str(error), re.IGNORECASE))
        self._left = "" if kind is None else f"{kind.__name__}: {error}".strip().splitlines()[0]
        alone = isinstance(error, Exception) and not (isinstance(error, UserError) and error.everywhere)
        if alone and self._topology.world > 1:  # time for the others to read the failure, or to report its cause
            self._named.wait(3 * PATIENCE_S if self._follows else 2 * PERIOD_S)
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * PERIOD_S)

    # -- sending ----------------------------------------------------------------------------------

    def _encode_beat(self, number: int) -> str:
        beat = Beat(self.place, _collectives_begun(), self._left, self._follows)
        return json.dumps([number, dataclasses.asdict(beat)])

    def _exchange_beats(self) -> None:
        """Send and read beats; if the store is gone, end, and the watcher notices that no beats arrive."""
        keys = [f"{self._key}/{who}" for who in (*self._watched, "verdict")]
        with contextlib.suppress(RuntimeError):
            for number in itertools.count(1):
                last = self._stop.is_set()
                self._store.set(f"{self._key}/{self._rank}", self._encode_beat(number))
                if self._rank == 0 and self._verdict:
                    self._store.set(keys[-1], json.dumps(self._verdict))
                if last:
                    return
                *beats, verdict = (text.decode() for text in self._store.multi_get(keys))
                self._beats = dict(zip(self._watched, beats, strict=True))
                self._verdict = self._verdict or {int(rank): text for rank, text in json.loads(verdict).items()}
                self._stop.wait(PERIOD_S)

    # -- watching ---------------------------------------------------------------------------------

    def _watch_own_waits(self) -> None:
        """End this process if a wait for data lasts longer than the loader's own time limit for its workers.

        The main thread may be inside a read of a network disk, in C, where neither signals nor exceptions reach it.
        """
        places, waited_s = self._places, 0.0
        while not self._stop.wait(PERIOD_S):
            waited_s = waited_s + PERIOD_S if places == self._places and self._place.endswith(WAITING) else 0.0
            places = self._places
            if waited_s > self._timeout_s + PATIENCE_S:
                where = f"rank {self._rank} (host {socket.gethostname()}, pid {os.getpid()})"
                ends = "This run ends; the same command resumes from its newest checkpoint"
                print(f"{where} is at {self._place}, for {waited_s:.0f} s. {ends}", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(file=2, all_threads=True)
                os._exit(LOST)

    def _watch(self) -> None:
        seen: dict[int, Seen] = {}
        beats: dict[int, str] = {}
        now_s, answered_s, before = 0.0, 0.0, time.monotonic()
        while not self._stop.wait(PERIOD_S):
            elapsed, before = time.monotonic() - before, time.monotonic()
            now_s += min(elapsed, 2 * PERIOD_S)  # this clock does not advance while this process is stopped
            if self._beats is not beats:
                answered_s = now_s
            new = {rank: text for rank, text in self._beats.items() if text != beats.get(rank)}
            beats = self._beats
            if self._rank == 0 or self._left:
                new[self._rank] = self._encode_beat(0)
            for rank, text in new.items():
                beat = Beat(**json.loads(text)[1])
                moved = rank not in seen or seen[rank].beat != beat
                seen[rank] = Seen(beat, now_s, now_s if moved else seen[rank].moved_s)
            unanswered_s = now_s - answered_s
            if unanswered_s > (self._timeout_s if self._left is None else PATIENCE_S):
                store = "as was the store where the ranks meet, which it or its launcher holds"
                self._verdict = self._verdict or {0: f"sent its last heartbeat {unanswered_s:.0f} s ago, {store}"}
            self._verdict = self._verdict or judge(seen, now_s, self._timeout_s, knows_all=self._rank == 0)
            if self._verdict:
                self._end(self._verdict)
                return

    def _end(self, verdict: Mapping[int, str]) -> None:
        """Report the ranks to blame, and end the process unless it is already ending."""
        leaving = self._left is not None
        faults = "; ".join(f"{self._names[rank]} {text}" for rank, text in sorted(verdict.items()))
        ends = "This run ends; the same command resumes from its newest checkpoint"
        print(f"rank {self._rank}: {faults}. {ends}", file=sys.stderr, flush=True)
        if self._rank in verdict and not leaving:
            faulthandler.dump_traceback(file=2, all_threads=True)
        if self._rank == 0:
            time.sleep(3 * PERIOD_S)  # time for the others to read the verdict: the store may end with this process
        self._named.set()
        if not leaving:
            os._exit(LOST)


def judge(seen: Mapping[int, Seen], now_s: float, timeout_s: float, knows_all: bool) -> dict[int, str]:
    """Return the ranks to blame, each with its fault; {} while the run can continue.

    Only a rank that `knows_all` ranks can detect late ones: for others, a late rank may be waiting for an unseen one.
    """
    failed = {rank: one for rank, one in seen.items() if one.beat.left}
    running = {rank: one for rank, one in seen.items() if one.beat.left is None}
    limit_s = PATIENCE_S if failed else timeout_s
    if silent := {rank: one for rank, one in running.items() if now_s - one.heard_s > limit_s}:
        return {
            r: f"sent its last heartbeat {now_s - s.heard_s:.0f} s ago at {s.beat.place}" for r, s in silent.items()
        }
    late = set(_late(running, now_s, timeout_s)) if knows_all else set()
    if not late and any(now_s - one.moved_s > limit_s for one in failed.values()):
        origins = {rank: one.beat for rank, one in failed.items() if not one.beat.follows}
        if origins:
            return {rank: f"failed at {beat.place}: {beat.left}" for rank, beat in origins.items()}
        late = set(running) if knows_all else set()
    return {
        rank: f"is alive but has been at {running[rank].beat.place} for {now_s - running[rank].moved_s:.0f} s"
        for rank in late
    }


def _late(running: Mapping[int, Seen], now_s: float, timeout_s: float) -> set[int]:
    """Return the ranks that make others wait too long.

    Such a rank has started fewer collectives than another in some group, and more than another in none.
    """
    behind, ahead = set(), set()
    for group in {group for one in running.values() for group in one.beat.begun}:
        begun = {rank: one.beat.begun[group] for rank, one in running.items() if group in one.beat.begun}
        behind |= {rank for rank, count in begun.items() if count < max(begun.values())}
        ahead |= {rank for rank, count in begun.items() if count > min(begun.values())}
    waits = any(now_s - running[rank].moved_s > timeout_s for rank in ahead)
    return behind - ahead if waits else set()


def _collectives_begun() -> dict[str, int]:
    """Return the number of collectives that this rank has started, by group.

    The default group is excluded, because ranks of a pipeline send different numbers of messages in it.
    """
    groups: list[Any] = [group for group in list(distributed_c10d._world.pg_map) if group is not dist.group.WORLD]
    return {distributed_c10d._world.pg_names[group]: group._get_sequence_number_for_group() for group in groups}
