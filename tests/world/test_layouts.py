"""The law of the house on phase init: one recipe and one seed give one curve under every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import run_world
from nano import NANO
from tiny_parts import make_parts
from tiny_runs import consumed, make_data, recipe_values, train_all

from spar_scale.runs.curves import LOSS_RELATIVE, NORM_RELATIVE, curve, distance

LAYOUTS = [(world, zero, 1) for world in (1, 2, 4) for zero in (1, 2, 3)] + [(2, 1, 2), (4, 1, 2)]
"""(processes, ZeRO stage, pipeline stages)"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    shards = make_data(folder / "data")
    autoencoder = Path(make_parts(folder / "parts", NANO)["pixel_autoencoder"])

    def values(name: str, **changes) -> dict:
        settings = {"model__preset": "nano", "checkpoint": {"every": 10}, **changes}
        return recipe_values(folder / name, shards, autoencoder, **settings)

    for world in (1, 2, 4):
        recipes = [
            values(f"{world}-{zero}-{pipeline}", parallel__zero=zero, parallel__pipeline=pipeline)
            for count, zero, pipeline in LAYOUTS
            if count == world
        ]
        if world < 4:
            stages, micro_batch = ((1,), 7) if world == 1 else ((1, 2, 3), 4)  # a block, and half of one
            recipes += [
                values(f"{world}-{zero}-bf16", precision="bf16", parallel={"zero": zero, "micro_batch": micro_batch})
                for zero in stages
            ]
        if world == 1:
            recipes.append(values("1-1-micro", parallel__micro_batch=5))
            recipes.append(values("1-1-recompute", parallel__recompute="blocks"))
            recipes.append(values("1-1-repeat"))
        run_world(world, train_all, recipes, initialise=False)
    return folder


@pytest.mark.parametrize(("world", "zero", "pipeline"), LAYOUTS[1:])
def test_every_layout_gives_the_curve_of_one_process(runs: Path, world: int, zero: int, pipeline: int) -> None:
    loss, norm = distance(curve(runs / f"{world}-{zero}-{pipeline}"), curve(runs / "1-1-1"))
    print(f"{world} processes, ZeRO {zero}, pipeline {pipeline}: loss {loss:.1e}, gradient norm {norm:.1e}")
    assert loss <= LOSS_RELATIVE
    assert norm <= NORM_RELATIVE


@pytest.mark.parametrize("name", ["1-1-micro", "1-1-recompute"])
def test_micro_batch_and_recomputation_change_nothing(runs: Path, name: str) -> None:
    loss, norm = distance(curve(runs / name), curve(runs / "1-1-1"))
    assert loss <= LOSS_RELATIVE
    assert norm <= NORM_RELATIVE


def test_the_same_layout_is_bit_equal(runs: Path) -> None:
    assert curve(runs / "1-1-repeat") == curve(runs / "1-1-1")


def test_clipping_was_active_and_the_loss_fell(runs: Path) -> None:
    losses, norms = zip(*curve(runs / "1-1-1"), strict=True)
    assert min(norms) > 0.5
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_bf16_stays_within_twice_the_spread_of_one_against_two_ranks(runs: Path, zero: int) -> None:
    one, two = curve(runs / "1-1-bf16"), curve(runs / "2-1-bf16")
    spread = max(abs(a - b) for (a, _), (b, _) in zip(one, two, strict=True))
    found = max(abs(a - b) for (a, _), (b, _) in zip(curve(runs / f"2-{zero}-bf16"), one, strict=True))
    print(f"bf16, 2 processes, ZeRO {zero}: {found:.1e}, one against two ranks {spread:.1e}")
    assert found <= 2 * spread


def test_bf16_is_near_fp32_and_not_equal_to_it(runs: Path) -> None:
    loss, _ = distance(curve(runs / "1-1-bf16"), curve(runs / "1-1-1"))
    assert 0 < loss < 0.03


@pytest.mark.parametrize("layout", ["1-1-1", "2-3-1", "4-2-1", "4-1-2", "1-1-micro"])
def test_every_layout_consumes_the_same_samples_once(runs: Path, layout: str) -> None:
    assert consumed(runs / layout) == list(range(120))
