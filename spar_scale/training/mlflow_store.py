"""What is asked of MLflow: one run for each training run, a parent for those of one directory, metrics, artifacts.

A training run has an id of ours (`tracking.run_id`), made where it trains and kept in its directory and
checkpoints; its MLflow run is the one with that id in a tag. So a restart, a lost answer and another server
lead to one run, and no server is needed to have an id. What is already there is asked of the server, not
remembered: sending again sends what is missing.

MLflow is imported by `load_mlflow` alone: that takes 3 core-seconds, a new database as many once more.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote

from parallel.errors import UserError
from spar_scale.config.recipe import Recipe, TrackingConfig, flatten, load_recipe
from spar_scale.training.tracking import run_id

OUR_ID = "spar_scale.id"
PACKAGES = ("spar-scale", "torch", "deepspeed", "transformers", "diffusers", "mlflow")
BATCH = 1000  # values that MLflow takes at once; params 100
PARAMS = 100
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
"""Environment that MLflow (3.17) reads: its own defaults retry for minutes, and report on their use."""
_SECRETS = frozenset({"token", "password", "passwd", "secret", "credential", "credentials", "key", "apikey"})
_CHECKOUT = Path(__file__).resolve().parents[2]


def load_mlflow() -> None:
    """Import MLflow, bounded in its retries and quiet in the log. Raises ImportError where it is not installed."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow.tracking

    with contextlib.suppress(ImportError):  # mlflow-skinny talks to servers only
        import mlflow.store.db.utils
        import mlflow.store.tracking.sqlalchemy_store

        mlflow.store.db.utils.MAX_RETRY_COUNT = 4  # MLflow 3.17 has no setting: 10 times are 100 s
    logging.getLogger("mlflow.store.db.utils").addFilter(_no_traceback)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a line for each retry


def _no_traceback(record: logging.LogRecord) -> bool:
    """Whether to log a line of MLflow's database: it logs an error with its traceback, then raises it."""
    return record.levelno < logging.ERROR


@dataclass(frozen=True)
class Target:
    """Where the runs under `root` go: a server, or the database in `root` where `uri` is None."""

    root: Path
    uri: str | None
    experiment: str

    @classmethod
    def of(cls, run_dir: Path, tracking: TrackingConfig, uri: str | None = None) -> Target:
        """The target of one run; `uri` stands in for the recipe's."""
        return cls(run_dir.resolve().parent, uri or tracking.uri, tracking.experiment)

    @property
    def address(self) -> str:
        """The URI that MLflow is given. SQLAlchemy (2.1) decodes the percent signs in the path of a database."""
        if self.uri is not None:
            return self.uri
        path = str(self.root / "mlflow.db")
        if "?" not in path and "%" not in path:
            return f"sqlite:///{path}"
        # MLflow (3.17) makes the directories of the path in "sqlite:///" without decoding it, so the driver is named.
        return f"sqlite+pysqlite:///{quote(path)}"

    @property
    def is_database(self) -> bool:
        """Whether MLflow writes to an SQLite file itself, without a server."""
        return self.address.startswith(("sqlite:", "sqlite+"))

    @property
    def shown(self) -> str:
        """The address without credentials."""
        return without_credentials(self.address)

    def fault(self, error: BaseException) -> str:
        """One line on what went wrong, short unless it is ours."""
        if isinstance(error, UserError):
            return str(error)
        text = f"{type(error).__name__}: {error}".replace(self.address, self.shown).split("\n")[0]
        return without_credentials(text)[:200]


class Store:
    """An open MLflow store with the experiment and the parent run of `target.root`."""

    def __init__(self, target: Target):
        from mlflow.tracking import MlflowClient

        self.target = target
        with _alone(target.root):  # two that make one database at once both fail
            self.client = MlflowClient(target.address)
            found = self.client.get_experiment_by_name(target.experiment)
            if found is not None and found.lifecycle_stage == "deleted":
                raise UserError(_deleted(target, found.experiment_id))
            self.experiment_id = found.experiment_id if found else self._make_experiment()
            self.parent_id = self.run(run_id(target.root), target.root.name, {}).info.run_id

    def run(self, our_id: str, name: str, tags: Mapping[str, str], start_ms: int | None = None) -> Any:
        """The MLflow run of an id of ours, made if it is not there (with a start in Unix time, or now)."""
        there = self.client.search_runs([self.experiment_id], f"tags.`{OUR_ID}` = '{our_id}'", max_results=1)
        if there:
            return there[0]
        return self.client.create_run(self.experiment_id, start_ms, {OUR_ID: our_id, **tags}, name)

    def log_files(self, files: Sequence[Path]) -> None:
        """Log files under the root as artifacts of the parent run, at their place there."""
        for file in files:
            folder = file.resolve().parent.relative_to(self.target.root)
            self.client.log_artifact(self.parent_id, str(file), None if folder == Path() else str(folder))

    def log_scores(self, scores: Mapping[str, float]) -> None:
        """Log numbers as metrics of the parent run, those that it does not have with this value.

        What MLflow allows in no name (the comma and the sign of a run under a switch) becomes an underscore.
        """
        from mlflow.entities import Metric

        there, now = self.client.get_run(self.parent_id).data.metrics, _milliseconds(time.time())
        named = {re.sub(r"[^\w\-. /]", "_", name): float(value) for name, value in scores.items()}
        new = [Metric(name, value, now, 0) for name, value in named.items() if there.get(name) != value]
        for first in range(0, len(new), BATCH):
            self.client.log_batch(self.parent_id, metrics=new[first : first + BATCH])
        self.client.set_terminated(self.parent_id)

    def _make_experiment(self) -> str:
        folder = None if self.target.uri else (self.target.root / "mlartifacts").as_uri()
        return self.client.create_experiment(self.target.experiment, artifact_location=folder)


class TrackedRun:
    """The MLflow run of one run directory, open for what is missing there."""

    def __init__(self, run_dir: Path, target: Target):
        from mlflow.entities import Param, RunTag

        recipe = load_recipe(run_dir / "recipe.yaml")
        self.steps, self.step, self.sent = recipe.train.steps, 0, 0
        self._last_ms: int | None = None
        self._store = store = Store(target)
        self._client = store.client
        about = {"mlflow.parentRunId": store.parent_id, "stage": recipe.stage, "phase": recipe.phase, **origin()}
        run = store.run(run_id(run_dir), run_dir.resolve().name, about, _first_ms(run_dir))
        self.id: str = run.info.run_id
        self._started = run.info.start_time
        params = public_params(recipe)
        there, parent = run.data.params, "mlflow.parentRunId"
        new = [Param(key, value) for key, value in params.items() if key not in there]
        for first in range(0, len(new), PARAMS):
            self._client.log_batch(self.id, params=new[first : first + PARAMS])
        changed = [RunTag(f"changed.{key}", value) for key, value in params.items() if there.get(key, value) != value]
        if run.data.tags.get(parent) != store.parent_id:  # the parent was deleted, and a new one made
            changed.append(RunTag(parent, store.parent_id))
        self._client.log_batch(self.id, tags=changed)  # a param keeps its first value
        self._client.update_run(self.id, status="RUNNING")
        self._there = self._losses()

    def send(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Log those lines of metrics.jsonl, in their order, that the run does not have with this loss.

        A step that was replayed after a restart is there already with the same loss, bit for bit; where it
        differs, it is logged once more and the later value counts.
        """
        from mlflow.entities import Metric

        batch: list[Metric] = []
        for line in lines:
            self.step, self._last_ms = line["step"], _milliseconds(line["time"])
            there = self._there.pop(line["step"], _ABSENT)
            if there == line["loss"]:
                continue
            values = [Metric(name, value, self._last_ms, line["step"]) for name, value in metrics_of(line).items()]
            if len(batch) + len(values) > BATCH:
                self._client.log_batch(self.id, metrics=batch)
                batch = []
            batch += values
            self.sent += 1
        if batch:
            self._client.log_batch(self.id, metrics=batch)

    def send_system(self, samples: Sequence[tuple[float, Mapping[str, float]]]) -> None:
        """Log samples (Unix time in s, values) of the machine; their step is the run's age in seconds."""
        from mlflow.entities import Metric

        values = [
            Metric(name, value, _milliseconds(time_s), max(0, int(time_s - self._started / 1000)))
            for time_s, sample in samples
            for name, value in sample.items()
        ]
        for first in range(0, len(values), BATCH):
            self._client.log_batch(self.id, metrics=values[first : first + BATCH])

    def end(self) -> None:
        """Close the run, as finished or as stopped on its way, and its parent."""
        self._client.set_terminated(self.id, "FINISHED" if self.step >= self.steps else "KILLED", self._last_ms)
        self._client.set_terminated(self._store.parent_id)

    def _losses(self) -> dict[int, float | None]:
        """Step -> loss as it is there; of a step logged twice the later."""
        history = sorted(self._client.get_metric_history(self.id, "loss"), key=lambda entry: entry.timestamp)
        return {entry.step: None if math.isnan(entry.value) else entry.value for entry in history}


_ABSENT = object()


def metrics_of(line: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of one line by MLflow's names; what was not finite is NaN."""
    named = {name: line[name] for name in ("loss", "grad_norm", "lr", "samples_per_s")}
    named |= {f"terms/{name}": value for name, value in line["terms"].items()}
    return {name: math.nan if value is None else float(value) for name, value in named.items()}


def public_params(recipe: Recipe) -> dict[str, str]:
    """The recipe by dotted keys, without what a database of many readers should not hold."""
    values = recipe.model_dump(mode="json", exclude={"tracking"})
    values["data"]["sources"] = {str(place): source for place, source in enumerate(values["data"]["sources"])}
    return {
        key: without_credentials(str(value))
        for key, value in flatten(values)
        if not _SECRETS & set(re.split(r"[._-]", key.lower()))
    }


def without_credentials(text: str) -> str:
    """A text whose URLs have lost user, password and query."""
    text = re.sub(r"(\w[\w+.-]*://)[^/\s@]*@", r"\1", text)
    return re.sub(r"(\w[\w+.-]*://[^\s?]*)\?\S*", r"\1", text)


def origin() -> dict[str, str]:
    """Tags that say which code ran: the commit of the checkout, the versions of what it stands on."""
    tags = {"mlflow.source.name": "spar-scale"}
    if (_CHECKOUT / ".git").exists():
        asked = ["git", "-C", str(_CHECKOUT), "rev-parse", "HEAD"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(asked, capture_output=True, text=True, timeout=5, check=True)
            tags["mlflow.source.git.commit"] = done.stdout.strip()
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            tags[f"version.{package}"] = metadata.version(package)
    return tags


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Hold `root/tracking.lock`: one process at a time makes the database, the experiment and the parent."""
    with open(root / "tracking.lock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # a forked loader worker holds the same open file


def _first_ms(run_dir: Path) -> int | None:
    """When the first step was logged, in Unix time."""
    with open(run_dir / "metrics.jsonl", encoding="utf-8") as file:
        line = file.readline()
    return _milliseconds(json.loads(line)["time"]) if line.endswith("\n") else None


def _deleted(target: Target, experiment_id: str) -> str:
    """What to do about an experiment that was deleted in MLflow, where its name stays taken."""
    return (
        f"tracking.experiment: found '{target.experiment}', which was deleted in MLflow at {target.shown}; restore it:"
        f" MLFLOW_TRACKING_URI={shlex.quote(target.shown)} mlflow experiments restore -x {experiment_id}"
        " (or give tracking.experiment another name)"
    )


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)
