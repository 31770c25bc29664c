"""MLflow mirrors the truth: what metrics.jsonl says is what MLflow shows, after every kind of interruption.

MLflow is the real one, with a database in a directory that all tests here share: to make one takes seconds.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import recipe_values

from parallel.errors import UserError
from spar_scale.cli import main
from spar_scale.config.recipe import Recipe, TrackingConfig
from spar_scale.training import mlflow_mirror
from spar_scale.training.mlflow_mirror import Mirror
from spar_scale.training.mlflow_store import public_params, without_credentials
from spar_scale.training.mlflow_sync import log_artifacts, sync
from spar_scale.training.tracking import RunLog, read_lines, run_id

HERE = TrackingConfig()
_warning = mlflow_mirror._log.warning


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def nowhere() -> str:
    """The address of a server that is not there."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def line(step: int, shift: float = 0.0, later_s: float = 0.0) -> dict[str, Any]:
    return {
        "step": step,
        "samples": step * 12,
        "loss": math.nan if step == 3 else 1 / step + shift,
        "grad_norm": 1.0 / 3,
        "norm_of": "gradient",
        "lr": 1e-3 * step,
        "samples_per_s": 9.5,
        "terms": {"reconstruction": 0.1 * step, "perceptual": 0.2},
        "skipped": False,
        "time": 1_700_000_000 + step / 7 + later_s,
    }


def make_run(root: Path, name: str, steps: int, **changes: Any) -> Path:
    """A run directory with its recipe, without any line."""
    run_dir = root / name
    run_dir.mkdir()
    settings = {"tracking": {"mirror": True}, "train__steps": steps, **changes}
    values = recipe_values(run_dir, str(root / "scenes-*.tar"), Path("autoencoder"), **settings)
    Recipe.model_validate_json(json.dumps(values)).save(run_dir / "recipe.yaml")
    return run_dir


def trained(run_dir: Path, first: int, last: int, later_s: float = 0.0, shift: float = 0.0) -> None:
    """What the trainer does for steps first to last: cut the log back, mirror, write, close."""
    log = RunLog(run_dir, first - 1)
    mirror = Mirror(run_dir, HERE)
    log.metrics([line(step, shift, later_s) for step in range(first, last + 1)])
    log.close()
    mirror.close(finished=True)


def client_of(root: Path) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{root}/mlflow.db")


def mlflow_run(root: Path, folder: Path) -> Any:
    """The one MLflow run of a run directory, or of a root."""
    client = client_of(root)
    experiment = client.get_experiment_by_name("spar")
    found = client.search_runs([experiment.experiment_id], f"tags.`spar_scale.id` = '{run_id(folder)}'")
    assert len(found) == 1
    return found[0]


def assert_curve_is_the_truth(root: Path, run_dir: Path, repeats: int = 0) -> None:
    """Every metric has the steps of metrics.jsonl in their order with its values; `repeats` steps have two."""
    client, run = client_of(root), mlflow_run(root, run_dir)
    lines = read_lines(run_dir / "metrics.jsonl")
    for name in ("loss", "grad_norm", "lr", "samples_per_s", "terms/reconstruction", "terms/perceptual"):
        history = sorted(client.get_metric_history(run.info.run_id, name), key=lambda entry: entry.timestamp)
        assert len(history) == len(lines) + repeats
        shown = {entry.step: entry.value for entry in history}
        group, _, term = name.partition("/")
        true = {entry["step"]: entry[group][term] if term else entry[name] for entry in lines}
        assert shown.keys() == true.keys()
        for step, value in true.items():
            assert math.isnan(shown[step]) if value is None else shown[step] == value, (name, step)


def test_the_curve_in_mlflow_is_the_one_in_metrics_jsonl(root: Path) -> None:
    run_dir = make_run(root, "plain", 250)
    trained(run_dir, 1, 250)
    assert_curve_is_the_truth(root, run_dir)
    run = mlflow_run(root, run_dir)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "plain"
    assert (run.info.start_time, run.info.end_time) == (1_700_000_000_142, 1_700_000_035_714)
    assert run.data.params["optimizer.lr"] == "0.001"
    assert (run.data.tags["stage"], run.data.tags["phase"]) == ("tokenizer", "init")
    assert run.data.tags["version.torch"]
    assert run.data.metrics["system/system_memory_usage_percentage"] > 0


def test_after_a_restart_the_run_is_the_same_and_replayed_steps_are_there_once(root: Path) -> None:
    run_dir = make_run(root, "restarted", 12)
    trained(run_dir, 1, 8)
    before = mlflow_run(root, run_dir)
    assert before.info.status == "KILLED"
    trained(run_dir, 6, 12, later_s=60)  # from a checkpoint at step 5: 6 to 8 are replayed, bit-equal
    after = mlflow_run(root, run_dir)
    assert after.info.run_id == before.info.run_id
    assert after.info.status == "FINISHED"
    assert_curve_is_the_truth(root, run_dir)


def test_where_a_replay_differs_the_surviving_value_is_the_last(root: Path) -> None:
    run_dir = make_run(root, "differing", 10)
    trained(run_dir, 1, 8)
    trained(run_dir, 6, 10, later_s=60, shift=1e-6)
    assert_curve_is_the_truth(root, run_dir, repeats=3)


def test_runs_are_children_of_one_parent(root: Path) -> None:
    runs = [make_run(root, name, 2) for name in ("first", "second")]
    for run_dir in runs:
        trained(run_dir, 1, 2)
    parent = mlflow_run(root, root)
    assert parent.info.run_name == root.name
    assert {mlflow_run(root, run).data.tags["mlflow.parentRunId"] for run in runs} == {parent.info.run_id}


def test_a_dead_server_costs_one_warning_and_no_time_and_sync_sends_all(
    root: Path, nowhere: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_mirror, "EVERY_S", 0.05)
    monkeypatch.setattr(mlflow_mirror, "LONGEST_S", 0.2)
    run_dir = make_run(root, "unheard", 40)
    log, mirror = RunLog(run_dir, 0), Mirror(run_dir, TrackingConfig(uri=nowhere))
    warned, longest = threading.Event(), 0.0
    monkeypatch.setattr(mlflow_mirror._log, "warning", lambda *words: (warned.set(), _warning(*words)))
    for step in range(1, 41):
        began = time.perf_counter()
        log.metrics([line(step)])
        longest = max(longest, time.perf_counter() - began)
        assert step != 20 or warned.wait(60)  # then it tries again and again, the last time in close
    log.close()
    began = time.perf_counter()
    mirror.close(finished=True)
    assert time.perf_counter() - began < 5
    assert longest < 1
    assert len(read_lines(run_dir / "metrics.jsonl")) == 40
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert nowhere in warning and f"spar-scale track sync {run_dir}" in warning
    with pytest.raises(UserError, match=f"MLflow at {nowhere} failed"):
        sync(run_dir, nowhere)
    database = f"sqlite:///{root}/mlflow.db"
    assert ": 40 of 40 steps sent" in sync(run_dir, database)
    assert_curve_is_the_truth(root, run_dir)
    assert ": 0 of 40 steps sent" in sync(run_dir, database)
    assert_curve_is_the_truth(root, run_dir)
    assert mlflow_run(root, run_dir).info.status == "FINISHED"


def test_sync_sends_what_is_missing_of_every_run_and_says_so(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run(root, "late", 6)
    trained(run_dir, 1, 3)
    RunLog(run_dir, 3).metrics([line(step) for step in range(4, 7)])
    assert main(["track", "sync", str(root)]) == 0
    said = capsys.readouterr().out
    assert f"{run_dir}: 3 of 6 steps sent" in said
    assert_curve_is_the_truth(root, run_dir)
    assert main(["track", "sync", str(root / "nothing")]) == 2
    assert "found no run here" in capsys.readouterr().err


def test_a_run_without_a_new_step_starts_nothing(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "done", 3)
    RunLog(run_dir, 0).metrics([line(1)])
    mirror = Mirror(run_dir, HERE)
    mirror.close(finished=True)
    assert not (tmp_path / "mlflow.db").exists()


def test_artifacts_and_scores_belong_to_the_parent(root: Path) -> None:
    run_dir = make_run(root, "judged", 2)
    trained(run_dir, 1, 2)
    (root / "evaluation").mkdir()
    files = [root / "report.html", root / "scores.json", root / "evaluation" / "generation.png"]
    for file in files:
        file.write_text(json.dumps({"t2i.average": 0.7, "core_seconds.tokenizer_encoder,encoder=frozen": 44.0}))
    log_artifacts(root, files)
    parent, client = mlflow_run(root, root), client_of(root)
    assert parent.data.metrics == {"t2i.average": 0.7, "core_seconds.tokenizer_encoder_encoder_frozen": 44.0}
    names = [entry.path for entry in client.list_artifacts(parent.info.run_id)]
    assert names == ["evaluation", "report.html", "scores.json"]
    assert [e.path for e in client.list_artifacts(parent.info.run_id, "evaluation")] == ["evaluation/generation.png"]
    assert (root / "mlartifacts").is_dir()
    log_artifacts(root, files[:1])
    assert len(client.get_metric_history(parent.info.run_id, "t2i.average")) == 1


def test_artifacts_that_do_not_get_through_are_a_warning(
    tmp_path: Path, nowhere: str, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = make_run(tmp_path, "unheard", 1, tracking={"uri": nowhere})
    RunLog(run_dir, 0).metrics([line(1)])
    (tmp_path / "report.html").write_text("a report")
    log_artifacts(tmp_path, [tmp_path / "report.html"])
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert nowhere in warning and f"spar-scale track sync {tmp_path}" in warning
    assert json.loads((tmp_path / "tracking.json").read_text())["artifacts"] == ["report.html"]


def test_secrets_are_not_told() -> None:
    values = recipe_values(Path("runs/x"), "s3://AKIA:hush@bucket/x-{0..9}.tar?token=hush", Path("parts"))
    values["model"]["pretrained"] |= {"tokenizer": "../t", "api_key": "hush"}
    values["tracking"] = {"uri": "postgresql://me:hush@host/db"}
    params = public_params(Recipe.model_validate_json(json.dumps(values)))
    assert "hush" not in json.dumps(params) and "AKIA" not in json.dumps(params)
    assert params["data.sources.0.shards"] == "s3://bucket/x-{0..9}.tar"
    assert params["model.pretrained.tokenizer"] == "../t"
    assert without_credentials("no answer from https://me:hush@host:5000/x") == "no answer from https://host:5000/x"


def test_an_id_is_made_once_and_one_from_a_checkpoint_is_kept(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    made = run_id(one)
    assert run_id(one, "another") == made
    assert run_id(other, made) == made == run_id(other)
    assert os.listdir(other) == ["tracking.json"]
