"""Mirror metrics.jsonl to MLflow: a thread on rank 0 that reads the file as it grows.

Training never waits for the thread and never calls MLflow. The thread imports MLflow only after the first new line,
when the loader's workers exist: a fork during an import would leave the import's locks held in the workers. A server
that does not respond causes one warning. The lines stay in the file and are sent when the server responds again, or by
`spar-scale track sync`. At the end of training the thread has PATIENCE_S to send the rest.
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

EVERY_S = 10.0  # interval of reading the file and of sampling the machine's load
LONGEST_S = 300.0  # longest interval of attempts while a server does not respond
PATIENCE_S = {"stopped": 3.0, "server": 10.0, "database": 60.0}  # creating a database is slow, but does not hang
BLOCK_BYTES = 1 << 20
SAMPLES = 360  # samples of the machine's load that are kept while a server does not respond
_log = logging.getLogger(__name__)


class Mirror:
    """Sends the lines that are appended to a run's metrics.jsonl, until `close`."""

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
        """Send the rest within PATIENCE_S; warn if something is left.

        If the run has not `finished`, the time is short, because the resumed run sends the rest.
        """
        self._stop.set()
        if not finished:
            self._thread.join(PATIENCE_S["stopped"])
            return
        self._loaded.wait()  # a next run in this process must not fork its workers during the import
        self._thread.join(PATIENCE_S["database" if self._target.is_database else "server"])
        if not self._done:
            self._warned &= not self._recovered  # after the message that MLflow has every step, warn again
            self._warn("not all steps were sent in time")

    def _mirror(self) -> None:
        """Wait for the first line, then send new lines every EVERY_S; after failures at increasing intervals."""
        try:
            if not self._has_new_line():
                self._done = True
                return
            load_mlflow()
        except Exception as error:  # most often, MLflow is not installed
            self._warn(self._target.fault(error))
            return
        finally:
            self._loaded.set()
        wait_s = EVERY_S
        psutil.cpu_percent()  # starts the measurement; the first call always returns 0
        while not self._done:
            ends = self._stop.wait(wait_s)
            self._samples.append((time.time(), machine()))
            try:
                self._send_or_reopen(ends)
                wait_s = EVERY_S
            except Exception as error:  # MLflow may raise anything; training must continue
                self._run, self._offset = None, 0
                self._warn(self._target.fault(error))
                wait_s = min(2 * wait_s, LONGEST_S)
                if ends:
                    return

    def _has_new_line(self) -> bool:
        """Wait for a line that was not in the file at the start; return False if `close` came first."""
        while True:
            ends = self._stop.wait(0.5)
            if self._file.stat().st_size > self._first_bytes:
                return True
            if ends:
                return False

    def _send_or_reopen(self, ends: bool) -> None:
        """Send new lines. If that fails, open the MLflow run again, as it may have been deleted, and send all lines.

        Lines that MLflow has are not sent again. A second failure is raised; its error is the more useful one.
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
            _log.info("MLflow at %s responds again and has every step", self._target.display_address)

    def _next_lines(self) -> tuple[list[dict[str, Any]], int] | None:
        """Return the complete lines after the offset, at most BLOCK_BYTES of them, and the offset after them."""
        with open(self._file, "rb") as file:
            file.seek(self._offset)
            block = file.read(BLOCK_BYTES)
        end = block.rfind(b"\n") + 1
        return ([json.loads(line) for line in block[:end].splitlines()], self._offset + end) if end else None

    def _warn(self, reason: str) -> None:
        if not self._warned:
            _log.warning(
                "warning: the metrics do not reach MLflow at %s (%s). Training continues; "
                "`spar-scale track sync %s` sends the missing steps",
                self._target.display_address, reason, self._run_dir,
            )  # fmt: skip
        self._warned = True


def machine() -> dict[str, float]:
    """Return the machine's load, by the names that MLflow uses for system metrics."""
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
