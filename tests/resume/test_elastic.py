"""A run of four processes goes on with two, with three and under other ZeRO stages; damage is survived."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from launching import WorldError, run_world
from tiny_runs import consumed, make_autoencoder, make_data, recipe_values, train_all

from parallel.checkpoint.manifest import read_manifest
from spar_scale.runs.curves import LOSS_RELATIVE, NORM_RELATIVE, curve, distance

CASES = {2: ("from-z2-to-z3", 3), 3: ("from-z2-to-z1", 1)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    shards, autoencoder = make_data(folder / "data"), make_autoencoder(folder / "autoencoder")

    def values(name: str, **changes) -> dict:
        return recipe_values(folder / name, shards, autoencoder, **changes)

    run_world(4, train_all, [values("whole", parallel__zero=2)], initialise=False)
    for world, (name, zero) in CASES.items():
        shutil.copytree(folder / "whole", folder / name)
        shutil.rmtree(folder / name / "checkpoints" / "step-00000010")
        changed = values(name, parallel__zero=zero, parallel__micro_batch=3)
        run_world(world, train_all, [changed], initialise=False)
    return folder


@pytest.mark.parametrize("world", CASES)
def test_four_processes_resume_as_fewer_under_another_zero_stage(runs: Path, world: int) -> None:
    resumed, whole = curve(runs / CASES[world][0]), curve(runs / "whole")
    assert resumed[:5] == whole[:5]
    loss, norm = distance(resumed[5:], whole[5:])
    print(f"4 processes ZeRO 2 resumed as {world} ZeRO {CASES[world][1]}: loss {loss:.1e}, gradient norm {norm:.1e}")
    assert loss <= LOSS_RELATIVE
    assert norm <= NORM_RELATIVE
    assert resumed[5:] != whole[5:], "a copy, not a resumed run"
    assert consumed(runs / CASES[world][0]) == list(range(120))


@pytest.fixture
def copy(runs: Path, tmp_path: Path) -> Path:
    """The whole run again, under its own recorded recipe."""
    shutil.copytree(runs / "whole", tmp_path / "run")
    return tmp_path / "run"


def resume(runs: Path, run_dir: Path, **changes) -> None:
    values = recipe_values(run_dir, str(runs / "data" / "scenes-*.tar"), runs / "autoencoder", **changes)
    run_world(1, train_all, [values], initialise=False)


def test_a_damaged_newest_checkpoint_is_passed_over(runs: Path, copy: Path) -> None:
    damaged = next((copy / "checkpoints" / "step-00000010").glob("*.distcp"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    resume(runs, copy)
    loss, norm = distance(curve(copy)[5:], curve(runs / "whole")[5:])
    assert loss <= LOSS_RELATIVE
    assert norm <= NORM_RELATIVE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer__lr": 2e-3}, "optimizer.lr"),
        ({"seed": 2}, "seed"),
        ({"global_batch": 16}, "global_batch"),
    ],
)
def test_a_run_of_another_recipe_is_refused(runs: Path, copy: Path, changes: dict, message: str) -> None:
    before = (copy / "recipe.yaml").read_bytes()
    with pytest.raises(WorldError, match=message):
        resume(runs, copy, **changes)
    assert (copy / "recipe.yaml").read_bytes() == before


def test_another_frozen_part_is_refused(runs: Path, copy: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(runs / "autoencoder", tmp_path / "other")
    weights = next(other.glob("*.safetensors"))
    tensors = load_file(weights)
    name = next(name for name in tensors if name.startswith("decoder"))
    tensors[name] += 1.0
    save_file(tensors, weights)
    recorded = (copy / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(recorded.replace(str(runs / "autoencoder"), str(other)))
    values = recipe_values(copy, str(runs / "data" / "scenes-*.tar"), other)
    with pytest.raises(WorldError, match="frozen part 'decoder'"):
        run_world(1, train_all, [values], initialise=False)


def test_changed_shards_are_refused(runs: Path, copy: Path, tmp_path: Path) -> None:
    shards = make_data(tmp_path / "data", scenes=64)
    recorded = (copy / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(recorded.replace(str(runs / "data"), str(tmp_path / "data")))
    shutil.rmtree(copy / "checkpoints" / "step-00000010")
    with pytest.raises(WorldError, match=r"data\.sources"):
        values = recipe_values(copy, shards, runs / "autoencoder")
        run_world(1, train_all, [values], initialise=False)


def test_the_checkpoint_says_what_it_holds(runs: Path) -> None:
    state = read_manifest(runs / "whole" / "checkpoints" / "step-00000010").state
    assert state["step"] == 10
    assert state["samples"] == 120
    assert all(scalars == {"step": 10} for scalars in state["optimizer_scalars"].values())
