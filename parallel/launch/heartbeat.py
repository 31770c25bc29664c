"""Who died and who hangs: every rank tells that it lives and where it is, and a run that cannot go on ends by name.

Once a second a thread of each rank says, through the store where the ranks met, at what place of the run it is and
how many collectives it has begun in each process group. Rank 0 reads what all say, the others read rank 0. To blame is
a rank that is silent for `timeout_s` (killed, stopped, its node gone); one that is late: `timeout_s` ago another began
a collective that this one has not begun; or one that failed. Every rank prints the same sentence about it, a late one
its stacks besides, and all end. So a step, a save or a load may be as long as it likes where no rank waits for another,
and a rank that waits is never taken for the one that it waits for.

The process is ended by os._exit: its main thread may stand in a collective, in C, where no exception reaches it, and an
orderly end would wait for the same collective. A step pays the setting of an attribute. Talking and watching are two
threads, because talking stands still where the store does. Not seen are waits of a pipeline's stages for each other,
which begin no collective: there the backend gives up, a little later, and who has not failed is named.

Written by hand, because torch's own watchdog knows NCCL alone and names no rank. Reads private names of torch 2.13:
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
"""How a place ends at which a rank waits for data."""
PATIENCE_S = 5.0
"""Seconds from a failure for the other ranks to end by themselves; who is silent for as long then is dead."""

_runs = itertools.count()  # tells the runs of one process apart in the store; ranks make the same runs


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself: where it is, the collectives begun by group, and how it left (None: it has not)."""

    place: str
    begun: Mapping[str, int] = field(default_factory=dict)
    left: str | None = None
    follows: bool = False


@dataclass
class Seen:
    """What is known of a rank: its last beat, and when, in seconds of the watcher, it was heard and had moved on."""

    beat: Beat
    heard_s: float
    moved_s: float


class Heartbeat:
    """Watches a run from `with` to its end: the other ranks, and this rank's own waits for data.

    The run sets `place`, in words that follow "at"; one that ends in WAITING is a wait for data. `timeout_s` is the
    longest that a rank may wait for another rank or for data.
    """

    def __init__(self, topology: Topology, timeout_s: float):
        self._place, self._places = "its start", 0
        self._topology, self._timeout_s, self._rank = topology, timeout_s, topology.rank
        self._watched: Sequence[int] = range(1, topology.world) if topology.rank == 0 else [0]
        self._words: dict[int, str] = {}  # rank -> its last beat as it came
        self._verdict: dict[int, str] = {}  # rank -> what is to be said of it
        self._left: str | None = None
        self._follows = False
        self._stop, self._named = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []

    @property
    def place(self) -> str:
        """Where the run is."""
        return self._place

    @place.setter
    def place(self, place: str) -> None:
        self._place = place
        self._places += 1  # tells two waits at one place apart

    def __enter__(self) -> Heartbeat:
        self._threads = [threading.Thread(target=self._watch_own_waits, daemon=True)]
        if self._topology.world > 1:
            self._key = f"heartbeat/{next(_runs)}"
            ours: Any = distributed_c10d._get_default_store()
            self._store = ours.clone()  # a connection of its own: the run's may stand in a wait
            self._store.set_timeout(datetime.timedelta(seconds=self._timeout_s))
            self._store.set(f"{self._key}/{self._rank}", self._encode_beat(0))
            if self._rank == 0:
                self._store.set(f"{self._key}/verdict", "{}")
            mine = f"rank {self._rank} (host {socket.gethostname()}, pid {os.getpid()})"
            self._names: list[str] = self._topology.gather(mine)  # and now the store has a word of every rank
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
        if alone and self._topology.world > 1:  # the others must hear of it, or name the cause
            self._named.wait(3 * PATIENCE_S if self._follows else 2 * PERIOD_S)
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * PERIOD_S)

    # -- talking ----------------------------------------------------------------------------------

    def _encode_beat(self, number: int) -> str:
        beat = Beat(self.place, _collectives_begun(), self._left, self._follows)
        return json.dumps([number, dataclasses.asdict(beat)])

    def _exchange_beats(self) -> None:
        """Say and read; a store that is gone is left to the watcher, who hears nothing any more."""
        keys = [f"{self._key}/{who}" for who in (*self._watched, "verdict")]
        with contextlib.suppress(RuntimeError):
            for number in itertools.count(1):
                last = self._stop.is_set()
                self._store.set(f"{self._key}/{self._rank}", self._encode_beat(number))
                if self._rank == 0 and self._verdict:
                    self._store.set(keys[-1], json.dumps(self._verdict))
                if last:
                    return
                *words, verdict = (text.decode() for text in self._store.multi_get(keys))
                self._words = dict(zip(self._watched, words, strict=True))
                self._verdict = self._verdict or {int(rank): text for rank, text in json.loads(verdict).items()}
                self._stop.wait(PERIOD_S)

    # -- watching ---------------------------------------------------------------------------------

    def _watch_own_waits(self) -> None:
        """End this process where a wait for data lasts longer than the loader, which waits for its workers, allows.

        The main thread may stand in a read of a network disk, in C, where neither a signal nor an exception reaches it.
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
        words: dict[int, str] = {}
        now_s, answered_s, before = 0.0, 0.0, time.monotonic()
        while not self._stop.wait(PERIOD_S):
            elapsed, before = time.monotonic() - before, time.monotonic()
            now_s += min(elapsed, 2 * PERIOD_S)  # a clock that stands where this process was stopped
            if self._words is not words:
                answered_s = now_s
            heard = {rank: text for rank, text in self._words.items() if text != words.get(rank)}
            words = self._words
            if self._rank == 0 or self._left:
                heard[self._rank] = self._encode_beat(0)
            for rank, text in heard.items():
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
        """Say who is to blame, and end the process, unless it is ending by itself."""
        leaving = self._left is not None
        told = "; ".join(f"{self._names[rank]} {text}" for rank, text in sorted(verdict.items()))
        ends = "This run ends; the same command resumes from its newest checkpoint"
        print(f"rank {self._rank}: {told}. {ends}", file=sys.stderr, flush=True)
        if self._rank in verdict and not leaving:
            faulthandler.dump_traceback(file=2, all_threads=True)
        if self._rank == 0:
            time.sleep(3 * PERIOD_S)  # for the others to read it: the store may end with this process
        self._named.set()
        if not leaving:
            os._exit(LOST)


def judge(seen: Mapping[int, Seen], now_s: float, timeout_s: float, knows_all: bool) -> dict[int, str]:
    """Who is to blame and what to say of each, by rank; nobody while the run goes on.

    Only who `knows_all` ranks can tell who is late: for others the late one may itself wait for a rank unseen.
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
    """Who keeps others waiting too long: behind somebody in the collectives of a group, ahead of nobody in any."""
    behind, ahead = set(), set()
    for group in {group for one in running.values() for group in one.beat.begun}:
        begun = {rank: one.beat.begun[group] for rank, one in running.items() if group in one.beat.begun}
        behind |= {rank for rank, count in begun.items() if count < max(begun.values())}
        ahead |= {rank for rank, count in begun.items() if count > min(begun.values())}
    waits = any(now_s - running[rank].moved_s > timeout_s for rank in ahead)
    return behind - ahead if waits else set()


def _collectives_begun() -> dict[str, int]:
    """Collectives that this rank has begun, by group; not in the default one, where a pipeline sends unequally much."""
    groups: list[Any] = [group for group in list(distributed_c10d._world.pg_map) if group is not dist.group.WORLD]
    return {distributed_c10d._world.pg_names[group]: group._get_sequence_number_for_group() for group in groups}
