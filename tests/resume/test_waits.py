"""A run that waits for data stops when it is asked to, and one that has no usable data stops by itself.

Both are stopped as at any other step: nothing half-trained is saved, and the same command goes on bit-equal.
"""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launching import run_world, start_process
from nano import NANO  # noqa: F401  makes the preset known
from PIL import Image
from tiny_runs import consumed, make_data, metrics, phase_values, train_all
from webdataset.writer import TarWriter

from parallel.errors import UserError
from parallel.launch.exit_codes import STOPPED
from spar_scale.data.tar_index import index_shard, write_index
from spar_scale.runs.curves import curve

SHORT: dict[str, Any] = {
    "train": {"steps": 6, "log_every": 1},
    "checkpoint": {"every": 1000, "keep": 2},
    "global_batch": 6,
    "data__task_block": 6,
    "parallel__micro_batch": 2,
}


def train_and_hang(values: dict[str, Any], micro_step: int) -> int:
    """Train; the worker hangs in this micro-step, and in the wait for it SIGTERM comes. Returns the exit code."""
    from spar_scale.data import loader

    read, next_batch, (empty, _) = loader._MicroBatchDataset.load, loader.Loader._next, os.pipe()

    def hanging_read(self: Any, number: int) -> Any:
        if number == micro_step:
            os.read(empty, 1)
        return read(self, number)

    def signalled(self: Any, batches: Any, number: int) -> Any:
        if number == micro_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return next_batch(self, batches, number)

    loader._MicroBatchDataset.load, loader.Loader._next = hanging_read, signalled  # type: ignore[method-assign]
    try:
        train_all(0, 1, [values])
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        loader._MicroBatchDataset.load, loader.Loader._next = read, next_batch  # type: ignore[method-assign]
    return 0


def stopped_and_whole(recipes: list[dict[str, Any]], micro_steps: list[int], codes: Path) -> None:
    """Train the first recipe, stopped in a wait at each of `micro_steps` and then to its end; and the second."""
    found = [train_and_hang(recipes[0], number) for number in micro_steps]
    train_all(0, 1, recipes)
    codes.write_text(json.dumps(found))


def test_a_run_that_waits_for_a_batch_saves_and_stops_and_goes_on_bit_equal(tmp_path: Path) -> None:
    make_data(tmp_path / "data", edits=0)
    stopped, whole = (
        phase_values(
            tmp_path / name, "bootstrap/autoencoder", tmp_path / "data", {}, "nano",
            **SHORT, data__workers=1,
        )
        for name in ("stopped", "whole")
    )  # fmt: skip
    process = start_process(stopped_and_whole, [stopped, whole], [4, 8, 12], tmp_path / "codes")
    process.join(120)
    process.kill()
    assert process.exitcode == 0
    assert json.loads((tmp_path / "codes").read_text()) == [STOPPED] * 3  # twice within a step, once before one
    assert len(curve(tmp_path / "whole")) == 6 and curve(tmp_path / "stopped") == curve(tmp_path / "whole")
    assert consumed(tmp_path / "stopped") == consumed(tmp_path / "whole")


def refused(rank: int, world: int, recipes: list[dict[str, Any]]) -> list[str]:
    """Train recipes one after another; return why each was refused, "" where it was not."""
    messages = []
    for values in recipes:
        try:
            train_all(rank, world, [values])
            messages.append("")
        except UserError as error:
            messages.append(str(error))
    return messages


def test_a_step_without_a_usable_sample_stops_all_ranks_and_is_not_saved(tmp_path: Path) -> None:
    def shard(name: str, good: Callable[[int], bool]) -> str:
        path = tmp_path / name
        picture = io.BytesIO()
        Image.linear_gradient("L").resize((32, 32)).convert("RGB").save(picture, "png")
        with open(path, "wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
            for number in range(12):
                content = picture.getvalue() if good(number) else b"not a picture"
                writer.write({"__key__": f"{number:04d}", "png": content})
        write_index(str(path), index_shard(str(path)))
        return str(path)

    def recipe(name: str, shards: str, **changes: Any) -> dict[str, Any]:
        short = {"train": {"steps": 6, "log_every": 100}, "checkpoint": {"every": 3}, "global_batch": 2}
        values = short | {"data__task_block": 2, "parallel__micro_batch": 1, "optimizer__warmup_steps": 0} | changes
        values = phase_values(tmp_path / name, "bootstrap/autoencoder", tmp_path, {}, "nano", **values)
        values["data"]["sources"][0]["shards"] = shards
        return values

    none, some = shard("none.tar", lambda _: False), shard("some.tar", lambda number: number != 7)
    recipes = [recipe("data", none), recipe("pipeline", none, parallel__pipeline=2), recipe("some", some)]
    messages = run_world(2, refused, recipes, initialise=False)
    assert messages[0] == messages[1]
    for name, message in zip(("data", "pipeline"), messages[0], strict=False):
        assert message.startswith("step 1: none of its 2 samples could be used")
        assert f"{none}: 00" in message and "not a readable image" in message and "bad_samples.jsonl" in message
        (line,) = metrics(tmp_path / name)
        assert line["loss"] is None and set(line["terms"].values()) == {None}
        assert not (tmp_path / name / "checkpoints").exists()
    assert messages[0][2] == ""  # one rank's only sample was bad
    assert all(line["loss"] > 0 for line in metrics(tmp_path / "some"))
