"""MLflow's database: it lies in the root of the runs whatever that is called, and what was deleted in it is found.

MLflow is the real one, with one database for all tests here: to make one takes seconds. Its folder has a name that
sweeps give, with the signs that mean something in a URL.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import recipe_values

from parallel.errors import UserError
from spar_scale.config.recipe import Recipe, TrackingConfig
from spar_scale.training import mlflow_mirror
from spar_scale.training.mlflow_mirror import Mirror
from spar_scale.training.mlflow_store import Target
from spar_scale.training.mlflow_sync import log_artifacts, sync
from spar_scale.training.tracking import RunLog, note_artifacts, read_lines, run_id

NAMES = (
    "plain",
    "a?b=c",
    "lr%3D1e-4",
    "100%",
    "x#y",
    "sp ace",
    "größe",
    "a@b:c",
    "a&b;c",
    "q'uo\"te",
    "[x]",
    "a+b",
    "%3F",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep") / "lr%3D1e-4?b=2 #größe"
    root.mkdir()
    return root


@pytest.fixture(scope="module")
def sound(root: Path) -> Path:
    """A run whose steps are all in the database."""
    run_dir = make_run(root, "sound", 1)
    sync(run_dir)
    return run_dir


def make_run(root: Path, name: str, steps: int, experiment: str = "spar", logged: int | None = None) -> Path:
    """A run directory with its recipe and `logged` lines of metrics, as many as steps by default."""
    run_dir = root / name
    run_dir.mkdir()
    tracking = {"mirror": True, "experiment": experiment}
    values = recipe_values(run_dir, str(root / "scenes-*.tar"), Path("parts"), tracking=tracking, train__steps=steps)
    Recipe.model_validate(values).save(run_dir / "recipe.yaml")
    append(run_dir, 1, steps if logged is None else logged)
    return run_dir


def append(run_dir: Path, first: int, last: int) -> None:
    log = RunLog(run_dir, first - 1)
    log.metrics(
        {
            "step": step, "samples": step, "loss": 1 / step, "grad_norm": 1.0, "norm_of": "gradient", "lr": 1e-3,
            "samples_per_s": 9.5, "terms": {}, "skipped": False, "time": 1_700_000_000 + step,
        }
        for step in range(first, last + 1)
    )  # fmt: skip
    log.close()


def client_of(root: Path) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(Target(root.resolve(), None, "spar").address)


def runs_of(root: Path, folder: Path, experiment: str = "spar") -> list[Any]:
    client = client_of(root)
    experiment_id = client.get_experiment_by_name(experiment).experiment_id
    return client.search_runs([experiment_id], f"tags.`spar_scale.id` = '{run_id(folder)}'")


def steps_of(root: Path, run: Any) -> list[int]:
    return sorted(entry.step for entry in client_of(root).get_metric_history(run.info.run_id, "loss"))


@pytest.mark.parametrize("name", NAMES)
def test_sqlalchemy_reads_the_path_of_the_database_back(name: str, tmp_path: Path) -> None:
    from sqlalchemy.engine import make_url

    target = Target(tmp_path / name, None, "spar")
    assert make_url(target.address).database == str(tmp_path / name / "mlflow.db")
    assert target.display_address == target.address and target.is_database


def test_database_and_artifacts_lie_in_the_root_and_nothing_beside_it(root: Path) -> None:
    run_dir = make_run(root, "first", 3)
    (root / "report.html").write_text("a report")
    assert ": 3 of 3 steps sent" in sync(root)
    log_artifacts(root, [root / "report.html"])
    assert os.listdir(root.parent) == [root.name]
    assert {"mlflow.db", "mlartifacts"} <= set(os.listdir(root))
    (parent,) = runs_of(root, root)
    assert [entry.path for entry in client_of(root).list_artifacts(parent.info.run_id)] == ["report.html"]
    (run,) = runs_of(root, run_dir)
    assert steps_of(root, run) == [1, 2, 3]


def test_a_deleted_experiment_is_refused_with_the_command_that_restores_it(root: Path) -> None:
    run_dir = make_run(root, "bygone", 2, experiment="bygone")
    sync(run_dir)
    client = client_of(root)
    experiment = client.get_experiment_by_name("bygone").experiment_id
    client.delete_experiment(experiment)
    with pytest.raises(UserError) as refusal:
        sync(run_dir)
    message = str(refusal.value)
    assert message.startswith("tracking.experiment: found 'bygone', which was deleted in MLflow at sqlite")
    address = shlex.quote(Target(root.resolve(), None, "spar").address)
    restore = f"MLFLOW_TRACKING_URI={address} mlflow experiments restore -x {experiment}"
    assert message.endswith(f"restore it: {restore} (or give tracking.experiment another name)")
    client.restore_experiment(experiment)
    assert ": 0 of 2 steps sent" in sync(run_dir)


def test_an_experiment_deleted_while_training_is_a_warning_with_the_command_and_no_step_is_lost(
    root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_mirror, "EVERY_S", 0.05)
    warned, sent = threading.Event(), threading.Event()
    warning, send = mlflow_mirror._log.warning, Mirror._send
    monkeypatch.setattr(mlflow_mirror._log, "warning", lambda *words: (warned.set(), warning(*words)))
    monkeypatch.setattr(Mirror, "_send", lambda mirror, ends: (send(mirror, ends), sent.set()))
    run_dir = make_run(root, "deleted", 4, experiment="deleted", logged=0)
    mirror = Mirror(run_dir, TrackingConfig(mirror=True, experiment="deleted"))
    append(run_dir, 1, 2)
    assert sent.wait(60)
    client = client_of(root)
    experiment = client.get_experiment_by_name("deleted").experiment_id
    client.delete_experiment(experiment)
    append(run_dir, 3, 4)
    assert warned.wait(60)
    client.restore_experiment(experiment)
    mirror.close(finished=True)
    (message,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert f"mlflow experiments restore -x {experiment}" in message and "Training continues" in message
    (run,) = runs_of(root, run_dir, "deleted")
    assert steps_of(root, run) == [1, 2, 3, 4]


def test_a_deleted_parent_is_made_anew_and_its_children_are_moved_to_it(root: Path) -> None:
    family = {name: make_run(root, name, 1, experiment="family") for name in ("elder", "younger")}
    for run_dir in family.values():
        sync(run_dir)
    (before,) = runs_of(root, root, "family")
    client_of(root).delete_run(before.info.run_id)
    for run_dir in family.values():
        sync(run_dir)
    (after,) = runs_of(root, root, "family")
    children = [run for run_dir in family.values() for run in runs_of(root, run_dir, "family")]
    assert [run.data.tags["mlflow.parentRunId"] for run in children] == [after.info.run_id] * 2
    assert after.info.run_id != before.info.run_id


def test_a_deleted_run_is_made_anew_with_every_step(root: Path) -> None:
    run_dir = make_run(root, "removed", 3)
    sync(run_dir)
    (before,) = runs_of(root, run_dir)
    client_of(root).delete_run(before.info.run_id)
    assert ": 3 of 3 steps sent" in sync(run_dir)
    (after,) = runs_of(root, run_dir)
    assert steps_of(root, after) == [1, 2, 3]


@pytest.mark.parametrize("content", ["", "[1]", '{"t2i.average": "0.7"}'])
def test_damaged_scores_are_refused_by_name_and_not_as_a_fault_of_mlflow(
    root: Path, content: str, request: pytest.FixtureRequest
) -> None:
    scores = root / "scores.json"
    scores.write_text(content)
    note_artifacts(root, ["scores.json"])
    request.addfinalizer(lambda: note_artifacts(root, []))
    with pytest.raises(UserError) as refusal:
        sync(root)
    assert str(refusal.value).startswith(f"{scores}: ") and "MLflow" not in str(refusal.value)
    assert str(refusal.value).endswith(
        f"; remove it and run `spar-scale evaluate {shlex.quote(str(root))}` to write a new one"
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [("loss", "0.5"), ("loss", None), ("time", None), ("lr", []), ("terms", 1), ("terms", {"a": "b"})],
)
def test_a_step_of_another_form_is_refused_by_its_line_and_not_as_a_fault_of_mlflow(
    field: str, value: Any, tmp_path: Path
) -> None:
    run_dir = make_run(tmp_path, "run", 3)
    lines = read_lines(run_dir / "metrics.jsonl")
    lines[1] = {key: entry for key, entry in lines[1].items() if key != field} | (
        {} if value is None else {field: value}
    )
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError) as refusal:
        sync(run_dir)
    message = str(refusal.value)
    assert message.startswith(f"{run_dir}/metrics.jsonl: line 2: {field}") and message.endswith("; remove this line")
    assert os.listdir(tmp_path) == ["run"]


def damaged(path: Path, content: bytes, statement: str = "") -> None:
    path.write_bytes(content)
    if statement:
        with sqlite3.connect(path) as connection:
            connection.execute(statement)
        connection.close()


DAMAGES = {
    "no database": (lambda path, content: damaged(path, b"no database" * 400), "file is not a database"),
    "cut": (lambda path, content: damaged(path, content[: len(content) // 2]), "database disk image is malformed"),
    "another schema": (
        lambda path, content: damaged(path, content, "UPDATE alembic_version SET version_num = 'unknown'"),
        "Detected out-of-date database schema (found version unknown",
    ),
    "a directory": (lambda path, content: path.mkdir(), "unable to open database file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_database_that_cannot_be_used_is_one_sentence_with_its_address(
    sound: Path, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, words = DAMAGES[damage]
    make(tmp_path / "mlflow.db", (sound.parent / "mlflow.db").read_bytes())
    with pytest.raises(UserError) as refusal:
        sync(sound, f"sqlite:///{tmp_path}/mlflow.db")
    message = str(refusal.value)
    assert message.startswith(f"{sound}: MLflow at sqlite:///{tmp_path}/mlflow.db failed (")
    assert words in message and "\n" not in message
    assert "Traceback" not in capsys.readouterr().err


def test_a_locked_database_is_one_sentence(sound: Path) -> None:
    address = f"{Target(sound.parent.resolve(), None, 'spar').address}?timeout=0.01"
    with sqlite3.connect(sound.parent / "mlflow.db") as holder:
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UserError, match=r"failed \(.*database is locked\)$"):
            sync(sound, address)
        holder.rollback()
    holder.close()


def test_a_database_that_breaks_while_it_is_open_prints_no_traceback(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "mlflow.db"
    copy.write_bytes((sound.parent / "mlflow.db").read_bytes())
    sync(sound, f"sqlite:///{copy}")
    damaged(copy, copy.read_bytes(), "DROP TABLE metrics")
    with pytest.raises(UserError, match=r"failed \(.*no such table: metrics\)$"):
        sync(sound, f"sqlite:///{copy}")
    assert "Traceback" not in capsys.readouterr().err
