"""Access to MLflow: one MLflow run per training run, a parent run per directory of runs, metrics, artifacts.

A training run has its own id (`tracking.run_id`), which is created on the training machine and kept in the run
directory and its checkpoints. Its MLflow run is the one with that id in a tag. So after a restart, a lost response or a
change of server there is still only one MLflow run, and no server is needed to create an id. The values that MLflow
already has are queried, not remembered, so sending again sends only the missing ones.

Only `load_mlflow` imports MLflow, because that takes 3 core-seconds; creating a database takes another 3.
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

ID_TAG = "spar_scale.id"
PACKAGES = ("spar-scale", "torch", "deepspeed", "transformers", "diffusers", "mlflow")
BATCH = 1000  # MLflow's limit for metrics in one request
PARAMS = 100  # MLflow's limit for params in one request
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
"""Environment variables of MLflow (3.17): its defaults retry for minutes and send telemetry."""
_SECRETS = frozenset({"token", "password", "passwd", "secret", "credential", "credentials", "key", "apikey"})
_CHECKOUT = Path(__file__).resolve().parents[2]


def load_mlflow() -> None:
    """Import MLflow with few retries and a quiet log. Raises ImportError if it is not installed."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow.tracking

    with contextlib.suppress(ImportError):  # mlflow-skinny has no database code
        import mlflow.store.db.utils
        import mlflow.store.tracking.sqlalchemy_store

        mlflow.store.db.utils.MAX_RETRY_COUNT = 4  # MLflow 3.17 has no setting; its 10 retries take 100 s
    logging.getLogger("mlflow.store.db.utils").addFilter(_no_traceback)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # else it logs a line per retry


def _no_traceback(record: logging.LogRecord) -> bool:
    """Filter out error records of MLflow's database code, which logs an error with traceback and then raises it."""
    return record.levelno < logging.ERROR


@dataclass(frozen=True)
class Target:
    """The MLflow store for the runs under `root`: a server, or the database in `root` if `uri` is None."""

    root: Path
    uri: str | None
    experiment: str

    @classmethod
    def of(cls, run_dir: Path, tracking: TrackingConfig, uri: str | None = None) -> Target:
        """Return the target of one run; `uri` replaces the recipe's."""
        return cls(run_dir.resolve().parent, uri or tracking.uri, tracking.experiment)

    @property
    def address(self) -> str:
        """The URI for MLflow."""
        if self.uri is not None:
            return self.uri
        path = str(self.root / "mlflow.db")
        if "?" not in path and "%" not in path:
            return f"sqlite:///{path}"
        # SQLAlchemy (2.1) decodes percent signs in the path of a database. MLflow (3.17) creates the directories of a
        # "sqlite:///" path without decoding it, but not those of a URI with a driver name.
        return f"sqlite+pysqlite:///{quote(path)}"

    @property
    def is_database(self) -> bool:
        """Whether MLflow writes to an SQLite file itself, without a server."""
        return self.address.startswith(("sqlite:", "sqlite+"))

    @property
    def display_address(self) -> str:
        """The address without credentials."""
        return without_credentials(self.address)

    def fault(self, error: BaseException) -> str:
        """Return one line that describes an error, without credentials; errors of other libraries are truncated."""
        if isinstance(error, UserError):
            return str(error)
        text = f"{type(error).__name__}: {error}".replace(self.address, self.display_address).split("\n")[0]
        return without_credentials(text)[:200]


class Store:
    """An open MLflow store with the experiment and the parent run of `target.root`."""

    def __init__(self, target: Target):
        from mlflow.tracking import MlflowClient

        self.target = target
        with _exclusive(target.root):  # two processes that create one database at the same time both fail
            self.client = MlflowClient(target.address)
            experiment = self.client.get_experiment_by_name(target.experiment)
            if experiment is not None and experiment.lifecycle_stage == "deleted":
                raise UserError(_deleted(target, experiment.experiment_id))
            self.experiment_id = experiment.experiment_id if experiment else self._make_experiment()
            self.parent_id = self.run(run_id(target.root), target.root.name, {}).info.run_id

    def run(self, spar_id: str, name: str, tags: Mapping[str, str], start_ms: int | None = None) -> Any:
        """Return the MLflow run with an id in its tag; create it if it does not exist (start in Unix time, or now)."""
        matches = self.client.search_runs([self.experiment_id], f"tags.`{ID_TAG}` = '{spar_id}'", max_results=1)
        if matches:
            return matches[0]
        return self.client.create_run(self.experiment_id, start_ms, {ID_TAG: spar_id, **tags}, name)

    def log_files(self, files: Sequence[Path]) -> None:
        """Log files under the root as artifacts of the parent run, with their paths relative to the root."""
        for file in files:
            folder = file.resolve().parent.relative_to(self.target.root)
            self.client.log_artifact(self.parent_id, str(file), None if folder == Path() else str(folder))

    def log_scores(self, scores: Mapping[str, float]) -> None:
        """Log numbers as metrics of the parent run, unless it has them with the same value.

        Characters that MLflow does not allow in names (such as "," and "=" in the name of a variant) become "_".
        """
        from mlflow.entities import Metric

        logged, now = self.client.get_run(self.parent_id).data.metrics, _milliseconds(time.time())
        allowed = {re.sub(r"[^\w\-. /]", "_", name): float(value) for name, value in scores.items()}
        new = [Metric(name, value, now, 0) for name, value in allowed.items() if logged.get(name) != value]
        for first in range(0, len(new), BATCH):
            self.client.log_batch(self.parent_id, metrics=new[first : first + BATCH])
        self.client.set_terminated(self.parent_id)

    def _make_experiment(self) -> str:
        folder = None if self.target.uri else (self.target.root / "mlartifacts").as_uri()
        return self.client.create_experiment(self.target.experiment, artifact_location=folder)


class TrackedRun:
    """The MLflow run of one run directory, to which the missing values are sent."""

    def __init__(self, run_dir: Path, target: Target):
        from mlflow.entities import Param, RunTag

        recipe = load_recipe(run_dir / "recipe.yaml")
        self.steps, self.step, self.sent = recipe.train.steps, 0, 0
        self._last_ms: int | None = None
        self._store = store = Store(target)
        self._client = store.client
        tags = {"mlflow.parentRunId": store.parent_id, "stage": recipe.stage, "phase": recipe.phase, **origin()}
        run = store.run(run_id(run_dir), run_dir.resolve().name, tags, _first_ms(run_dir))
        self.id: str = run.info.run_id
        self._started = run.info.start_time
        params = public_params(recipe)
        logged, parent = run.data.params, "mlflow.parentRunId"
        new = [Param(key, value) for key, value in params.items() if key not in logged]
        for first in range(0, len(new), PARAMS):
            self._client.log_batch(self.id, params=new[first : first + PARAMS])
        # MLflow does not let a param change its value, so a changed one becomes a tag.
        changed = [RunTag(f"changed.{key}", value) for key, value in params.items() if logged.get(key, value) != value]
        if run.data.tags.get(parent) != store.parent_id:  # the parent was deleted and created again
            changed.append(RunTag(parent, store.parent_id))
        self._client.log_batch(self.id, tags=changed)
        self._client.update_run(self.id, status="RUNNING")
        self._logged_losses = self._losses()

    def send(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Log the lines of metrics.jsonl, in their order, that the run does not have with the same loss.

        A step that was replayed after a restart was already logged with exactly the same loss. If the loss differs, the
        step is logged again and the later value counts.
        """
        from mlflow.entities import Metric

        batch: list[Metric] = []
        for line in lines:
            self.step, self._last_ms = line["step"], _milliseconds(line["time"])
            if self._logged_losses.pop(line["step"], _ABSENT) == line["loss"]:
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
        """Log samples (Unix time in s, values) of the machine's load; their step is the run's age in seconds."""
        from mlflow.entities import Metric

        values = [
            Metric(name, value, _milliseconds(time_s), max(0, int(time_s - self._started / 1000)))
            for time_s, sample in samples
            for name, value in sample.items()
        ]
        for first in range(0, len(values), BATCH):
            self._client.log_batch(self.id, metrics=values[first : first + BATCH])

    def end(self) -> None:
        """Close the run, as FINISHED after its last step, else as KILLED, and close its parent."""
        self._client.set_terminated(self.id, "FINISHED" if self.step >= self.steps else "KILLED", self._last_ms)
        self._client.set_terminated(self._store.parent_id)

    def _losses(self) -> dict[int, float | None]:
        """Return the logged losses, step -> loss; of a step that was logged twice the later."""
        history = sorted(self._client.get_metric_history(self.id, "loss"), key=lambda entry: entry.timestamp)
        return {entry.step: None if math.isnan(entry.value) else entry.value for entry in history}


_ABSENT = object()  # None is a loss that was not finite


def metrics_of(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of one line by their names in MLflow; values that were not finite are NaN."""
    values = {name: line[name] for name in ("loss", "grad_norm", "lr", "samples_per_s")}
    values |= {f"terms/{name}": value for name, value in line["terms"].items()}
    return {name: math.nan if value is None else float(value) for name, value in values.items()}


def public_params(recipe: Recipe) -> dict[str, str]:
    """Return the recipe by dotted keys, without secrets and credentials."""
    values = recipe.model_dump(mode="json", exclude={"tracking"})
    values["data"]["sources"] = {str(index): source for index, source in enumerate(values["data"]["sources"])}
    return {
        key: without_credentials(str(value))
        for key, value in flatten(values)
        if not _SECRETS & set(re.split(r"[._-]", key.lower()))
    }


def without_credentials(text: str) -> str:
    """Return a text with user, password and query removed from its URLs."""
    text = re.sub(r"(\w[\w+.-]*://)[^/\s@]*@", r"\1", text)
    return re.sub(r"(\w[\w+.-]*://[^\s?]*)\?\S*", r"\1", text)


def program_commit() -> str | None:
    """Return the commit of the checkout that this program runs from, None where it is installed without one."""
    if (_CHECKOUT / ".git").exists():
        command = ["git", "-C", str(_CHECKOUT), "rev-parse", "HEAD"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    return None


def origin() -> dict[str, str]:
    """Return tags that identify the code: the commit of the checkout, and the versions of the main packages."""
    tags = {"mlflow.source.name": "spar-scale"}
    if (commit := program_commit()) is not None:
        tags["mlflow.source.git.commit"] = commit
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            tags[f"version.{package}"] = metadata.version(package)
    return tags


@contextlib.contextmanager
def _exclusive(root: Path) -> Iterator[None]:
    """Hold `root/tracking.lock`: one process at a time creates the database, the experiment and the parent run."""
    with open(root / "tracking.lock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Explicitly: a forked loader worker shares the open file, so closing it here would not release the lock.
            fcntl.flock(file, fcntl.LOCK_UN)


def _first_ms(run_dir: Path) -> int | None:
    """Return when the first step was logged, in milliseconds of Unix time."""
    with open(run_dir / "metrics.jsonl", encoding="utf-8") as file:
        line = file.readline()
    return _milliseconds(json.loads(line)["time"]) if line.endswith("\n") else None


def _deleted(target: Target, experiment_id: str) -> str:
    """Return the error message for an experiment that was deleted in MLflow, which keeps its name in use."""
    return (
        f"tracking.experiment: found '{target.experiment}', which was deleted in MLflow at {target.display_address};"
        f" restore it: MLFLOW_TRACKING_URI={shlex.quote(target.display_address)} mlflow experiments restore"
        f" -x {experiment_id}"
        " (or give tracking.experiment another name)"
    )


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)
