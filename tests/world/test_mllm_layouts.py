"""One curve under every layout where tasks of several sources are mixed: stage bootstrap, phase mllm."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import run_world
from tiny_runs import LOSS_RELATIVE, NORM_RELATIVE, consumed, curve, distance, recipe_values, train_all

from spar_scale.data.shapes_world import World
from spar_scale.data.shards import make_world
from spar_scale.inference.ask import ask

pytestmark = pytest.mark.timeout(600)

LAYOUTS = [(1, 1, 1), (2, 1, 1), (4, 3, 1), (2, 1, 2)]
"""(processes, ZeRO stage, pipeline stages)"""
STEPS = 6


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mllm")
    make_world(World(size=32, seed=5, scenes=64, heldout=1, edits=32, per_shard=32), folder / "data")
    members = {"captions": "scenes", "questions": "scenes", "edits": "edits", "texts": "scenes"}
    sources = [{"name": name, "shards": str(folder / "data" / f"{kind}-*.tar")} for name, kind in members.items()]

    def values(world: int, zero: int, pipeline: int) -> dict:
        return recipe_values(
            folder / f"{world}-{zero}-{pipeline}", "", Path(), stage="bootstrap", phase="mllm", train__steps=STEPS,
            model={"preset": "tiny"}, objective={}, optimizer__groups={}, data__sources=sources, data__task_block=3,
            parallel={"zero": zero, "pipeline": pipeline, "micro_batch": 2}, checkpoint={"every": STEPS},
        )  # fmt: skip

    for world in sorted({world for world, _, _ in LAYOUTS}):
        recipes = [values(*layout) for layout in LAYOUTS if layout[0] == world]
        run_world(world, train_all, recipes, initialise=False, timeout_s=300)
    return folder


@pytest.mark.parametrize(("world", "zero", "pipeline"), LAYOUTS[1:])
def test_every_layout_gives_the_curve_of_one_process(runs: Path, world: int, zero: int, pipeline: int) -> None:
    found, golden = runs / f"{world}-{zero}-{pipeline}", runs / "1-1-1"
    loss, norm = distance(curve(found), curve(golden))
    print(f"{world} processes, ZeRO {zero}, pipeline {pipeline}: loss {loss:.1e}, gradient norm {norm:.1e}")
    assert loss <= LOSS_RELATIVE
    assert norm <= NORM_RELATIVE
    assert consumed(found) == consumed(golden) == list(range(12 * STEPS))


def test_the_loss_fell_and_the_run_can_be_asked(runs: Path) -> None:
    losses, _ = zip(*curve(runs / "1-1-1"), strict=True)
    assert losses[-1] < losses[0]
    from PIL import Image

    Image.new("RGB", (50, 40), "blue").save(runs / "photograph.png")
    said = ask(runs / "1-1-1", runs / "photograph.png", "How many objects are there?")
    assert f"step-{STEPS:08d}" in said.splitlines()[1]
    assert (runs / "1-1-1" / "pretrained" / "tokenizer.json").is_file()
