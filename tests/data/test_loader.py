"""The loader: one stream of global batches whatever the ranks, workers, micro-batch and resume point."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from parallel.errors import UserError
from spar_scale.data.loader import Loader, Source
from spar_scale.data.spec import Draw, SampleSpec

SPEC = SampleSpec("images", 16, draws={"noise": Draw((2, 3), "normal"), "time": Draw((), "uniform")})
STEPS, GLOBAL_BATCH, TASK_BLOCK = 5, 30, 8  # blocks of 8, 8, 8 and 6


def load(world: Path, micro_batch=8, rank=0, size=1, workers=0, first_step=0, steps=STEPS, seed=0, spec=SPEC) -> Loader:
    sources = [
        Source("scenes", str(world / "scenes-*.tar"), 0.6),
        Source("edits", str(world / "edits-*.tar"), 0.4),
    ]
    return Loader(sources, spec, seed, GLOBAL_BATCH, TASK_BLOCK, micro_batch, rank, size, workers, first_step, steps)


def stream(world: Path, micro_batch=8, size=1, **given) -> dict[int, dict[str, torch.Tensor]]:
    """Return {sample number: its tensors} over all ranks; every number at most once, padding all zero."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    for rank in range(size):
        loader = load(world, micro_batch, rank, size, **given)
        batches = list(loader)
        assert len(batches) == given.get("steps", STEPS) * loader.micro_steps
        for batch in batches:
            assert batch["errors"] == []
            tensors = {name: value for name, value in batch.items() if name not in ("sample", "errors")}
            assert {len(value) for value in tensors.values()} == {micro_batch}
            for slot, number in enumerate(batch["sample"].tolist()):
                values = {name: value[slot] for name, value in tensors.items()}
                if number < 0:
                    assert all(not value.any() for value in values.values())
                else:
                    assert number not in found and values["weight"] == 1
                    found[number] = values
    return found


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n][k], b[n][k]) for n in a for k in a[n])


@pytest.fixture(scope="module")
def golden(tiny_world):
    return stream(tiny_world, micro_batch=TASK_BLOCK)


@pytest.mark.parametrize(
    ("size", "micro_batch", "workers"),
    [(1, 3, 0), (2, 4, 0), (2, 1, 2), (3, 4, 0), (4, 2, 2), (7, 1, 0), (7, 4, 0), (1, 64, 2)],
)
def test_the_stream_is_the_same_under_every_layout(tiny_world, golden, size, micro_batch, workers):
    assert sorted(golden) == list(range(STEPS * GLOBAL_BATCH))
    assert same(golden, stream(tiny_world, micro_batch, size, workers=workers))


@pytest.mark.parametrize(
    ("first_step", "size", "workers"), [(1, 1, 0), (2, 3, 0), (3, 2, 2), (3, 7, 0), (4, 1, 0), (4, 3, 0)]
)
def test_the_stream_goes_on_from_any_step(tiny_world, golden, first_step, size, workers):
    rest = stream(tiny_world, 4, size, workers=workers, first_step=first_step, steps=STEPS - first_step)
    assert same({n: v for n, v in golden.items() if n >= first_step * GLOBAL_BATCH}, rest)


def test_batches_come_in_order_with_the_declared_tensors(tiny_world):
    loader = load(tiny_world, workers=2)
    firsts = []
    for batch in loader:
        assert batch["images"].shape == (8, 3, 16, 16) and batch["images"].dtype == torch.float32
        assert batch["images"].min() >= 0 and batch["images"].max() <= 1
        assert batch["noise"].shape == (8, 2, 3) and batch["time"].shape == (8,)
        assert batch["noise"].dtype == batch["time"].dtype == batch["weight"].dtype == torch.float32
        assert batch["sample"].dtype == torch.int64
        firsts.append(int(batch["sample"][0]))
    assert firsts == [step * GLOBAL_BATCH + block * TASK_BLOCK for step in range(STEPS) for block in range(4)]


def test_draws_have_their_distributions_and_differ_between_samples(golden):
    noise = torch.stack([values["noise"] for values in golden.values()])
    time = torch.stack([values["time"] for values in golden.values()])
    assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.1
    assert time.min() >= 0 and time.max() < 1 and abs(time.mean() - 0.5) < 0.1
    assert len(time.unique()) == len(time)


def test_another_seed_is_another_stream(tiny_world, golden):
    assert not same(golden, stream(tiny_world, seed=1))


def test_crop_and_flip_follow_the_spec(make_shard, picture):
    shard = make_shard({"a": {"jpg": picture(24, 8, kind="jpeg")}})

    def images(**given):
        spec = SampleSpec("images", 8, **given)
        loader = Loader([Source("a", shard)], spec, 0, 32, 32, 32, 0, 1, 0, 0, 1)
        return next(iter(loader))["images"]

    still = images(crop="center", flip=False)
    assert all(torch.equal(still[0], other) for other in still)
    flipped = images(crop="center", flip=True)
    mirrored = [torch.equal(still[0].flip(-1), other) for other in flipped]
    assert 0 < sum(mirrored) < 32
    assert all(m or torch.equal(still[0], other) for m, other in zip(mirrored, flipped, strict=True))
    assert len({tuple(image.flatten().tolist()) for image in images(crop="random", flip=False)}) > 8


def bad_samples(picture) -> dict[str, dict[str, bytes]]:
    return {
        "good": {"png": picture(), "txt": b"a good one"},
        "text": {"png": b"this is no image"},
        "cut": {"png": picture(64, 64)[:-200]},
        "none": {"txt": b"only words"},
        "thin": {"png": picture(1, 1)},
        "deep": {"png": picture(mode="I;16")},
        "zero": {"jpg": b""},
        "bomb": {"png": bomb(picture())},
    }


def bomb(png: bytes) -> bytes:
    """The same PNG with a header that claims 60000 x 60000 pixels."""
    import struct
    import zlib

    header = b"IHDR" + struct.pack(">II", 60000, 60000) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_samples_keep_their_number_with_weight_0_and_are_reported(make_shard, picture, workers):
    samples = bad_samples(picture)
    shard = make_shard(samples)
    n = len(samples)
    (batch,) = Loader([Source("bad", shard)], SPEC, 0, n, n, n, 0, 1, workers, 0, 1)
    reasons = {error["key"]: error["reason"] for error in batch["errors"]}
    assert reasons.keys() == samples.keys() - {"good"}
    assert "not a readable image" in reasons["text"] and "not a readable image" in reasons["cut"]
    assert reasons["none"] == (
        "no member png|jpg|jpeg|webp|output.png|output.jpg|output.jpeg|output.webp; the sample has txt"
    )
    assert reasons["thin"] == "1x1 pixels; both edges need at least 2"
    assert reasons["deep"].startswith("image mode I;16")
    assert "DecompressionBomb" in reasons["bomb"]
    assert sorted(batch["sample"].tolist()) == list(range(n))
    numbers = {error["sample"] for error in batch["errors"]}
    for slot, number in enumerate(batch["sample"].tolist()):
        assert batch["weight"][slot] == (0 if number in numbers else 1)
        assert batch["images"][slot].any() == (number not in numbers)
    assert {(error["shard"], error["source"]) for error in batch["errors"]} == {(shard, "bad")}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_vanishes_stops_the_run_and_is_named(tiny_world, make_shard, picture, workers):
    shard = make_shard({"a": {"png": picture()}})
    loader = Loader([Source("a", shard)], SPEC, 0, 4, 4, 4, 0, 1, workers, 0, 2)
    os.remove(shard)
    with pytest.raises(UserError) as refusal:
        list(loader)
    assert str(refusal.value) == f"{shard}: cannot be read (No such file or directory)"


def test_a_shard_replaced_under_a_run_is_refused(make_shard, picture):
    shard = make_shard({"a": {"png": picture()}})
    loader = Loader([Source("a", shard)], SPEC, 0, 4, 4, 4, 0, 1, 0, 0, 2)
    make_shard({"a": {"png": picture()}, "b": {"png": bytes(20000)}}, indexed=False)
    with pytest.raises(UserError, match=r"bytes, but its index was made for \d+; .*data index"):
        list(loader)


def test_urls_are_read_like_files(tiny_world, golden, tmp_path):
    sources = [
        Source("scenes", f"file://{tiny_world}/scenes-*.tar", 0.6),
        Source("edits", f"file://{tiny_world}/edits-*.tar", 0.4),
    ]
    loader = Loader(sources, SPEC, 0, GLOBAL_BATCH, TASK_BLOCK, 8, 0, 1, 0, 0, 1)
    for batch in loader:
        for slot, number in enumerate(batch["sample"].tolist()):
            assert number < 0 or torch.equal(batch["images"][slot], golden[number]["images"])
    assert loader.digest == load(tiny_world).digest


def test_the_digest_changes_with_the_shards(tiny_world, make_shard, picture):
    def digest(*samples: str) -> str:
        shard = make_shard({key: {"png": picture()} for key in samples})
        return Loader([Source("a", shard)], SPEC, 0, 4, 4, 4, 0, 1, 0, 0, 1).digest

    assert digest("a", "b") == digest("a", "b")
    assert len({digest("a", "b"), digest("a", "c"), digest("a")}) == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"spec": SampleSpec("image", 16)},
            "sample.task is 'image'; known: images, captions, questions, edits, texts, generation, editing, language,"
            " conditioned; did you mean 'images'?",
        ),
        ({"rank": 2, "size": 2}, "dp_rank is 2 of 2; it must be at least 0 and less than dp_size"),
        ({"micro_batch": 0}, "micro_batch is 0; it must be at least 1"),
    ],
)
def test_a_loader_that_makes_no_sense_is_refused(tiny_world, given, message):
    with pytest.raises(UserError) as refusal:
        load(tiny_world, **given)
    assert str(refusal.value) == message


def test_leaving_the_loop_ends_the_workers(tiny_world):
    import multiprocessing

    before = set(multiprocessing.active_children())
    for _ in load(tiny_world, workers=2):
        workers = set(multiprocessing.active_children()) - before
        assert len(workers) == 2
        for worker in workers:
            assert worker.pid is not None
            for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                os.kill(worker.pid, name)
        break
    assert not (set(multiprocessing.active_children()) & workers)


def test_workers_outlive_signals(tiny_world, golden):
    import multiprocessing

    count = 0
    for number, batch in enumerate(load(tiny_world, workers=2)):
        if number == 0:
            for worker in multiprocessing.active_children():
                assert worker.pid is not None
                for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                    os.kill(worker.pid, name)
        count += int(batch["weight"].sum())
    assert count == STEPS * GLOBAL_BATCH


@pytest.mark.parametrize(
    ("then", "message"),
    [
        ('raise ValueError("meant")', "ValueError: meant"),
        ("Timer(0.3, os.kill, (active_children()[0].pid, 9)).start(); list(batches)", "a worker process was lost"),
    ],
)
def test_a_failing_program_does_not_wait_for_its_workers(tiny_world, then, message):
    """An exception keeps the loop's frames alive up to the exit, with workers that ignore SIGTERM."""
    program = f"""
        import os
        from multiprocessing import active_children
        from threading import Timer
        from spar_scale.data.loader import Loader, Source
        from spar_scale.data.spec import SampleSpec
        sources = [Source("a", "{tiny_world}/scenes-*.tar")]
        loader = Loader(sources, SampleSpec("images", 16), 0, 8, 8, 8, 0, 1, 2, 0, 99999)
        batches = iter(loader)
        next(batches)
        {then}
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.returncode == 1 and message in done.stderr


def test_importing_the_loader_imports_no_model_library():
    program = "import sys, spar_scale.data.loader; print([m for m in HEAVY if m in sys.modules])"
    heavy = ["transformers", "diffusers", "deepspeed", "webdataset", "fsspec.implementations"]
    done = subprocess.run(
        [sys.executable, "-c", program.replace("HEAVY", str(heavy))], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


ROOT = Path(__file__).parents[2]


def test_a_signal_before_a_worker_is_ready_does_not_end_it(tiny_world, monkeypatch):
    from spar_scale.data import loader

    ready = loader._start_worker

    def signalled(worker: int) -> None:
        for name in loader.PARENT_SIGNALS:
            os.kill(os.getpid(), name)
        ready(worker)

    monkeypatch.setattr(loader, "_start_worker", signalled)
    assert sum(int(batch["weight"].sum()) for batch in load(tiny_world, workers=1, steps=1)) == GLOBAL_BATCH
