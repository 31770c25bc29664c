"""The scale of the latents does not depend on the number of ranks; each batch and a long write move the heartbeat."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from pathlib import Path
from typing import Any

import pytest
from launching import run_world
from nano import NANO
from tiny_parts import make_parts
from tiny_runs import make_data, phase_values

from parallel.errors import UserError
from spar_scale.data.tar_index import index_shard, write_index


def measure(rank: int, world: int, values: dict[str, Any]) -> tuple[float, int, int]:
    """Return the scale of a phase's first model, its number of pictures, and how often progress was reported."""
    from parallel.launch.world import start, stop
    from parallel.topology import Layout, Topology
    from spar_scale.config.recipe import Recipe
    from spar_scale.stages import build
    from spar_scale.stages.forward import Forward
    from spar_scale.training.calibration import measured_scale

    launch = start()
    recipe = Recipe.model_validate_json(json.dumps(values))
    stage, reports = build(recipe), list[str]()
    stage.model.eval()
    try:
        scale = measured_scale(recipe, Forward(stage, NANO), Topology(Layout()), launch.device, reports.append)
    finally:
        stop()
    return scale.value, scale.pictures, len(set(reports))


def write_for_long(rank: int, world: int) -> tuple[bool, int]:
    """Return whether a function of the first rank ended after others had reported, and the number of reports."""
    from parallel.launch.agreement import run_long_on_first_rank

    reported, ended, reports = threading.Event(), [rank > 0], list[str]()

    def report(text: str) -> None:
        reports.append(text)
        if len(reports) == 3:
            reported.set()

    run_long_on_first_rank(None, lambda: ended.append(reported.wait(60)), report)
    return ended[-1], len(reports)


def fail_for_long(rank: int, world: int) -> None:
    from parallel.launch.agreement import run_long_on_first_rank

    def fail() -> None:
        raise UserError("disk full")

    run_long_on_first_rank(None, fail, lambda text: None)


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("calibration")
    make_data(folder / "data")
    parts = make_parts(folder / "parts", NANO)
    return phase_values(folder / "run", "tokenizer/encoder", folder / "data", parts, "nano")


def test_the_scale_is_that_of_one_process_and_every_batch_is_reported(values: dict[str, Any]):
    ((alone, pictures, reports),) = run_world(1, measure, values, initialise=False)
    assert pictures == 256 and reports > 4, "256 pictures in batches of 64, and the end"
    for world in (2, 3):
        found = run_world(world, measure, values, initialise=False)
        assert len({scale for scale, _, _ in found}) == 1
        for scale, pictures, reports in found:
            assert scale == pytest.approx(alone, rel=1e-6) and pictures == 256
            assert reports > -(-4 // world), "one for each batch, and the end"


def test_bad_pictures_do_not_count_and_without_a_good_one_the_shard_is_named(values: dict[str, Any], tmp_path: Path):
    shard = tmp_path / "scenes-bad.tar"
    with tarfile.open(shard, "w") as tar:
        member = tarfile.TarInfo("00000000.png")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"none"))
    write_index(str(shard), index_shard(str(shard)))
    bad = {**values, "data": {**values["data"], "sources": [{"name": "images", "shards": str(shard)}]}}
    with pytest.raises(Exception, match=r"none of the first 256 images of data\.sources could be used") as failed:
        run_world(2, measure, bad, initialise=False)
    assert isinstance(failed.value.__cause__, UserError) and "00000000" in str(failed.value)


def test_ranks_that_wait_for_a_long_write_go_on_reporting():
    for ended, reports in run_world(2, write_for_long):
        assert ended and reports >= 3


def test_a_write_that_fails_fails_on_every_rank():
    with pytest.raises(Exception, match="disk full") as failed:
        run_world(2, fail_for_long)
    assert isinstance(failed.value.__cause__, UserError)
