"""A new optimizer is one entry in the table: recipes, layouts, resume, planner, parity, report and submit take it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from launching import run_world
from tiny_runs import make_autoencoder, make_data, metrics, recipe_values, train_all

from parallel.checkpoint.manifest import read_manifest
from parallel.optimizers import OPTIMIZERS, GroupState, Optimizer
from parallel.topology import Layout
from parallel.zero.state_bytes import state_bytes
from spar_scale.cli.arguments import build_parser
from spar_scale.cluster.submit import submit
from spar_scale.config.recipe import Recipe
from spar_scale.evaluation.report import sources
from spar_scale.planning.plan import count
from spar_scale.runs.curves import LOSS_RELATIVE, NORM_RELATIVE, curve, distance
from spar_scale.runs.parity import Runs

NEW = "adamax"
STEPS = 4


def register() -> None:
    """Add torch's Adamax to the table; its second state is a running maximum, `exp_inf`."""

    def build(groups: list[dict[str, Any]]) -> Any:
        import torch

        return torch.optim.Adamax(groups)

    OPTIMIZERS[NEW] = Optimizer(build, GroupState(("exp_avg", "exp_inf"), scalars_on="host"))


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(OPTIMIZERS, NEW, raising=False)  # restores the table after the test
    register()


def train(rank: int, world: int, recipes: list[dict[str, Any]]) -> int:
    register()
    return train_all(rank, world, recipes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """STEPS steps in one process, in two of ZeRO 3, and in one that resumes what two have begun."""
    folder = tmp_path_factory.mktemp("optimizer")
    shards, autoencoder = make_data(folder / "data"), make_autoencoder(folder / "autoencoder")

    def values(name: str, **changes: Any) -> dict[str, Any]:
        general = {"optimizer__name": NEW, "optimizer__schedule": "constant", "train": {"steps": STEPS, "log_every": 2}}
        return recipe_values(folder / name, shards, autoencoder, **general, **changes)

    half = values("resumed", parallel__zero=2)
    run_world(2, train, [values("two", parallel__zero=3)], initialise=False)
    run_world(2, train, [half | {"train": {"steps": STEPS // 2, "log_every": 2}}], initialise=False)
    recipe = folder / "resumed" / "recipe.yaml"  # as of a run that was stopped half-way
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"train": half["train"]}))
    run_world(1, train, [values("one"), half], initialise=False)
    return folder


@pytest.mark.parametrize("name", ["two", "resumed"])
def test_every_layout_gives_the_curve_of_one_process(runs: Path, name: str) -> None:
    loss, norm = distance(curve(runs / name), curve(runs / "one"))
    assert loss <= LOSS_RELATIVE and norm <= NORM_RELATIVE
    losses = [loss for loss, _ in curve(runs / "one")]
    assert losses[-1] < losses[0]


def test_its_state_is_in_the_checkpoint_by_name(runs: Path) -> None:
    manifest = read_manifest(runs / "one" / "checkpoints" / "step-00000004")
    assert {record.kind for record in manifest.keys.values()} >= {"exp_avg", "exp_inf", "ema", "model"}
    assert all(scalars == {"step": STEPS} for scalars in manifest.state["optimizer_scalars"].values())


def test_the_planner_counts_its_state(runs: Path) -> None:
    recipe = Recipe.model_validate_json(json.dumps(yaml.safe_load((runs / "one" / "recipe.yaml").read_text())))
    plain = recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={"name": "adamw"})})
    found = []
    for one in (recipe, plain):
        counted = count(one, 1)
        shape = counted.zero_shape(Layout(), 1, half=False)
        found.append(state_bytes(list(counted.weights.values()), counted.num_groups, shape)["optimizer"])
    assert found[0] == found[1] > 0  # two tensors and a step each


def test_parity_report_and_submit_take_it(runs: Path, tmp_path: Path) -> None:
    options = build_parser().parse_args(["parity", "--recipe", "x.yaml", "--optimizer", NEW])
    assert f"optimizer.name={options.optimizer}" in Runs(optimizer=options.optimizer).changes()
    assert [run.metrics[-1]["step"] for run in sources.read(runs).runs] == [STEPS] * 3
    (tmp_path / "tokenizer_init.yaml").write_text((runs / "one" / "recipe.yaml").read_text())
    lines = submit(tmp_path, tmp_path / "runs", [], dry_run=True)
    assert "stage1_tokenizer.sh" in lines
    assert metrics(runs / "one")[-1]["norm_of"] == "gradient"
