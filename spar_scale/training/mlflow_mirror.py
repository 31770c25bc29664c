"""The mirror of metrics.jsonl in MLflow: a thread of rank 0 that reads the file as it grows.

Training never waits for it and never calls MLflow. The first new line starts it, when the loader's workers
have been forked: a fork amid an import would leave them its locks. A server that does not answer costs
one warning; the lines stay in the file and are sent when it answers again, or by `spar-scale track sync`. At the
end of training it has PATIENCE_S to send the rest.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import psutil

from spar_scale.config.recipe import TrackingConfig
from spar_scale.training.mlflow_store import Target, TrackedRun, load_mlflow

EVERY_S = 10.0  # between two looks at the file, and two samples of the machine
LONGEST_S = 300.0  # between two attempts at a server that does not answer
PATIENCE_S = {"stopped": 3.0, "server": 10.0, "database": 60.0}  # a new database takes a while, but does not hang
BLOCK_BYTES = 1 << 20
SAMPLES = 360  # of the machine, kept while a server does not answer
_log = logging.getLogger(__name__)


class Mirror:
    """Sends what is appended to the metrics of one run directory, until `close`."""

    def __init__(self, run_dir: Path, tracking: TrackingConfig):
        self._run_dir, self._file = run_dir.resolve(), run_dir.resolve() / "metrics.jsonl"
        self._target = Target.of(run_dir, tracking)
        self._first_bytes = self._file.stat().st_size if self._file.exists() else 0
        self._offset = 0
        self._run: TrackedRun | None = None
        self._samples: deque[tuple[float, dict[str, float]]] = deque(maxlen=SAMPLES)
        self._stop, self._loaded = threading.Event(), threading.Event()
        self._warned = self._recovered = self._done = False
        self._thread = threading.Thread(target=self._mirror, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def close(self, finished: bool) -> None:
        """Send the rest, for as long as PATIENCE_S allows, and say so where something is left.

        Of a run that has not `finished`, its continuation sends it: that one is not waited for.
        """
        self._stop.set()
        if not finished:
            self._thread.join(PATIENCE_S["stopped"])
            return
        self._loaded.wait()  # imports end; the workers of the next run must not be forked amid one
        self._thread.join(PATIENCE_S["database" if self._target.is_database else "server"])
        if not self._done:
            self._warned &= not self._recovered  # it was said that nothing is missing
            self._warn("not all was sent in time")

    def _mirror(self) -> None:
        """Wait for the first line, then send what is new every EVERY_S; after a failure less and less often."""
        try:
            if not self._grows():
                self._done = True
                return
            load_mlflow()
        except Exception as error:  # not installed, most often
            self._warn(self._target.fault(error))
            return
        finally:
            self._loaded.set()
        wait_s = EVERY_S
        psutil.cpu_percent()  # the first call has nothing to compare with
        while not self._done:
            ends = self._stop.wait(wait_s)
            self._samples.append((time.time(), machine()))
            try:
                self._send_or_reopen(ends)
                wait_s = EVERY_S
            except Exception as error:  # whatever MLflow raises, training goes on
                self._run, self._offset = None, 0
                self._warn(self._target.fault(error))
                wait_s = min(2 * wait_s, LONGEST_S)
                if ends:
                    return

    def _grows(self) -> bool:
        """Wait for a line that was not there at the start; whether one came."""
        while True:
            ends = self._stop.wait(0.5)
            if self._file.stat().st_size > self._first_bytes:
                return True
            if ends:
                return False

    def _send_or_reopen(self, ends: bool) -> None:
        """Send what is new; where that fails, find the run anew, as it may have been deleted in MLflow, and send all.

        What is there already is not sent again. A second failure is raised: it names the cause.
        """
        if self._run is not None:
            with contextlib.suppress(Exception):
                return self._send(ends)
            self._run, self._offset = None, 0
        self._send(ends)

    def _send(self, ends: bool) -> None:
        if self._run is None:
            self._run = TrackedRun(self._run_dir, self._target)
        while lines := self._next_lines():
            self._run.send(lines[0])
            self._offset = lines[1]
        self._run.send_system(list(self._samples))
        self._samples.clear()
        if ends:
            self._run.end()
            self._done = True
        if self._warned and not self._recovered:
            self._recovered = True
            _log.info("MLflow at %s answers and has every step", self._target.shown)

    def _next_lines(self) -> tuple[list[dict[str, Any]], int] | None:
        """Whole lines behind the offset, at most a block of them, and the offset behind them."""
        with open(self._file, "rb") as file:
            file.seek(self._offset)
            block = file.read(BLOCK_BYTES)
        end = block.rfind(b"\n") + 1
        return ([json.loads(line) for line in block[:end].splitlines()], self._offset + end) if end else None

    def _warn(self, why: str) -> None:
        if not self._warned:
            _log.warning(
                "warning: the metrics do not reach MLflow at %s (%s). Training goes on; "
                "`spar-scale track sync %s` sends what is missing",
                self._target.shown, why, self._run_dir,
            )  # fmt: skip
        self._warned = True


def machine() -> dict[str, float]:
    """How busy the machine is, by the names under which MLflow shows such metrics."""
    memory = psutil.virtual_memory()
    values = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_percentage": memory.percent,
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/process_memory_megabytes": psutil.Process().memory_info().rss / 1e6,
    }
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is not None and cuda.is_initialized():
        values["system/gpu_0_memory_usage_megabytes"] = cuda.memory_reserved() / 1e6
    return values
