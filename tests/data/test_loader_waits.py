"""A wait for a worker's batch ends: with the batch, with the worker's failure, when asked to, or after a time limit.

The workers are real processes. A limit of the system on them stands for a full /dev/shm, an empty pipe for a disk.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from parallel.errors import UserError
from spar_scale.data import loader
from spar_scale.data.loader import Batch, Loader, Source
from spar_scale.data.spec import SampleSpec

BATCH, STEPS = 4, 8


def load(shards: Path, steps: int = STEPS, **given) -> Loader:
    sources = [Source("scenes", str(shards / "scenes-*.tar"))]
    return Loader(sources, SampleSpec("images", 16), 0, BATCH, BATCH, BATCH, 0, 1, 1, 0, steps, prefetch=1, **given)


@pytest.fixture
def release(monkeypatch) -> Callable[[], object]:
    """Micro-step 2 hangs in a read in its worker, until the function that this returns is called."""
    read_end, write_end = os.pipe()
    read = loader._MicroBatchDataset.load

    def hanging(dataset, micro_step: int):
        if micro_step == 2:
            os.read(read_end, 1)
        return read(dataset, micro_step)

    monkeypatch.setattr(loader._MicroBatchDataset, "load", hanging)
    monkeypatch.setattr(loader, "POLL_S", 0.05)
    return lambda: os.write(write_end, b"x")


def begin(loading: Loader) -> tuple[Iterator[Batch], int]:
    """Take the first two batches; return where the rest comes from, and the worker's pid."""
    before = set(multiprocessing.active_children())
    batches = iter(loading)
    assert [next(batches)["sample"].tolist() for _ in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    (worker,) = set(multiprocessing.active_children()) - before
    assert worker.pid is not None
    return batches, worker.pid


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
    read = loader._MicroBatchDataset.load

    def limited(dataset, micro_step: int):
        batch = read(dataset, micro_step)
        resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))
        return batch

    monkeypatch.setattr(loader._MicroBatchDataset, "load", limited)
    with pytest.raises(UserError) as refusal:
        list(load(tiny_world, timeout_s=5))
    message = str(refusal.value)
    assert message.startswith("/dev/shm: ") and " MB free of " in message
    assert cause in message and advice in message and message.endswith("or set data.workers=0")


def test_a_worker_that_does_not_answer_is_named_with_what_it_must_load(tiny_world, release):
    batches, pid = begin(load(tiny_world, timeout_s=1))
    with pytest.raises(UserError) as refusal:
        next(batches)
    message = str(refusal.value)
    assert message.startswith(f"data.workers: no batch after 1 s (guards.timeout_s): worker 0 of 1 (pid {pid})")
    assert "samples 8 to 11 from " in message and "scenes-0" in message and "raise guards.timeout_s" in message
    with pytest.raises(ProcessLookupError):  # a worker that hangs is ended
        os.kill(pid, 0)


def test_what_is_raised_in_a_wait_ends_it(tiny_world, release):
    waits: list[int] = []

    def end() -> None:
        if waits:
            raise InterruptedError

    batches, pid = begin(load(tiny_world, while_waiting=end))
    waits.append(1)
    with pytest.raises(InterruptedError):
        next(batches)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_batch_that_comes_after_several_looks_is_not_lost(tiny_world, release):
    """Fails where torch's iterator can no longer be asked again after its timeout (2.13 can)."""
    looks: list[int] = []

    def look() -> None:
        looks.append(1)
        if len(looks) == 3:
            release()

    batches, _ = begin(load(tiny_world, while_waiting=look))
    numbers = [number for batch in batches for number in batch["sample"].tolist()]
    assert len(looks) >= 3 and numbers == list(range(8, BATCH * STEPS))
