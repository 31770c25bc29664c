"""A run that goes on from a checkpoint goes on in its MLflow run, also where only the checkpoint knows which."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from launching import run_world
from tiny_runs import make_autoencoder, make_data, recipe_values

from spar_scale.runs.curves import curve


def train_and_go_on(rank: int, world: int, values: dict[str, Any], losses: list[int]) -> list[Any]:
    """Train; then lose the last checkpoint and go on, first with the id in the directory, then without.

    Returns what was found after each: the MLflow runs, their steps by name of metric, ids of the checkpoint.
    """
    from mlflow.tracking import MlflowClient

    from parallel.checkpoint.manifest import read_manifest
    from parallel.launch.world import stop
    from spar_scale.config.recipe import Recipe
    from spar_scale.training.trainer import train

    run_dir, found = Path(values["run_dir"]), []
    for lost in losses:
        if lost:
            shutil.rmtree(run_dir / "checkpoints" / f"step-{lost:08d}")
        if len(found) == 2:
            (run_dir / "tracking.json").unlink()
        assert train(Recipe.model_validate_json(json.dumps(values))) == 0
        client = MlflowClient(f"sqlite:///{run_dir.parent}/mlflow.db")
        (experiment,) = [each for each in client.search_experiments() if each.name == "spar"]
        runs = [run for run in client.search_runs([experiment.experiment_id]) if run.info.run_name == run_dir.name]
        shown = {}
        for name in ("loss", "grad_norm"):
            history = client.get_metric_history(runs[0].info.run_id, name)
            shown[name] = [(entry.step, entry.value) for entry in sorted(history, key=lambda entry: entry.step)]
        tracking = read_manifest(run_dir / "checkpoints" / "step-00000010").state["tracking"]
        found.append(([run.info.run_id for run in runs], shown, tracking))
    stop()
    return found


def test_a_run_that_goes_on_keeps_its_mlflow_run_and_shows_each_step_once(tmp_path: Path) -> None:
    shards, parts = make_data(tmp_path / "data"), make_autoencoder(tmp_path / "autoencoder")
    changes: dict[str, Any] = {"tracking": {"mirror": True}}
    values = recipe_values(tmp_path / "runs" / "init", shards, parts, **changes)
    found = run_world(1, train_and_go_on, values, [0, 10, 10], initialise=False, timeout_s=400)[0]
    true = curve(tmp_path / "runs" / "init")
    assert len(true) == 10
    ids, shown, tracking = found[0]
    assert len(ids) == 1 and len(tracking) == 32
    assert shown["loss"] == [(step, loss) for step, (loss, _) in enumerate(true, 1)]
    assert shown["grad_norm"] == [(step, norm) for step, (_, norm) in enumerate(true, 1)]
    assert found[1] == found[0]
    assert found[2] == found[0]
