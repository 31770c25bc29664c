"""A wait for a worker's batch ends: with the batch, with the worker's failure, when asked to, or after a time limit.

The workers are real processes. A limit of the system on them stands for a full /dev/shm, SIGSTOP for a read that hangs.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from parallel.errors import UserError
from spar_scale.data import loader
from spar_scale.data.loader import Loader, Source
from spar_scale.data.spec import SampleSpec

BATCH, STEPS = 4, 12


def load(shards: Path, steps: int = STEPS, **given) -> Loader:
    sources = [Source("scenes", str(shards / "scenes-*.tar"))]
    return Loader(sources, SampleSpec("images", 16), 0, BATCH, BATCH, BATCH, 0, 1, 1, 0, steps, prefetch=1, **given)


def stopped(loading: Loader) -> tuple[Callable[[], object], int]:
    """A function that takes the next batch, of a loader whose one worker is stopped, and the worker's pid."""
    before = set(multiprocessing.active_children())
    batches = iter(loading)
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGSTOP)
    return lambda: [next(batches) for _ in range(STEPS - 1)], worker.pid


@pytest.mark.parametrize(
    ("limit", "value", "cause", "advice"),
    [
        (resource.RLIMIT_FSIZE, 1000, "File too large", "docker run --shm-size=8g"),
        (resource.RLIMIT_NOFILE, 3, "Too many open files", "ulimit -n"),
    ],
)
def test_a_batch_that_does_not_fit_into_shared_memory_is_refused_at_once(
    tiny_world, monkeypatch, limit: int, value: int, cause: str, advice: str
):
    read = loader._MicroBatches.load

    def limited(dataset, micro_step: int):
        batch = read(dataset, micro_step)
        resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))
        return batch

    monkeypatch.setattr(loader._MicroBatches, "load", limited)
    with pytest.raises(UserError) as refusal:
        list(load(tiny_world, timeout_s=5))
    message = str(refusal.value)
    assert message.startswith("/dev/shm: ") and " MB free of " in message
    assert cause in message and advice in message and message.endswith("or set data.workers=0")


def test_a_worker_that_does_not_answer_is_named_with_what_it_must_load(tiny_world, monkeypatch):
    monkeypatch.setattr(loader, "POLL_S", 0.05)
    take, pid = stopped(load(tiny_world, timeout_s=2))
    began = time.monotonic()
    with pytest.raises(UserError) as refusal:
        take()
    message = str(refusal.value)
    assert message.startswith(f"data.workers: found no batch after 2 s (guards.timeout_s): worker 0 of 1 (pid {pid})")
    assert "scenes-0" in message and "raise guards.timeout_s" in message and "MB free of" in message
    assert time.monotonic() - began < 6  # the stopped worker is not waited for
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_what_is_raised_between_two_looks_ends_the_wait(tiny_world, monkeypatch):
    monkeypatch.setattr(loader, "POLL_S", 0.05)

    pid = 0

    def end() -> None:
        if pid:
            raise InterruptedError

    take, pid = stopped(load(tiny_world, while_waiting=end))
    with pytest.raises(InterruptedError):
        take()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_batch_that_comes_after_several_looks_is_not_lost(tiny_world, monkeypatch):
    """Fails where torch's iterator can no longer be asked again after its timeout (2.13 can)."""
    monkeypatch.setattr(loader, "POLL_S", 0.05)
    looks: list[int] = []

    def look() -> None:
        looks.append(1)
        if len(looks) == 3:
            os.kill(pid, signal.SIGCONT)

    take, pid = stopped(load(tiny_world, while_waiting=look))
    batches = take()
    assert len(looks) >= 3 and isinstance(batches, list)
    numbers = [number for batch in batches for number in batch["sample"].tolist()]
    assert numbers == list(range(BATCH, BATCH * STEPS))
