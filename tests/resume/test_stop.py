"""A signal on one rank stops all at the same step, with a checkpoint there and an exit code of its own.

The same command goes on, and the curve is bit-equal to that of a run that was never stopped.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from launching import run_world
from nano import NANO
from tiny_parts import make_parts
from tiny_runs import consumed, make_data, phase_values, train_all

from parallel import checkpoint
from parallel.launch.exit_codes import STOPPED
from parallel.launch.world import stop
from spar_scale.runs.curves import curve
from spar_scale.training.preemption import SIGNALS

STEPS = 40


def train_until(rank: int, world: int, values: dict[str, Any], number: int, lines: int) -> int:
    """Train; on the last rank the signal comes when the run has logged so many lines. Returns the exit code."""
    log = Path(values["run_dir"]) / "metrics.jsonl"

    def ask() -> None:
        while not log.exists() or log.read_bytes().count(b"\n") < lines:
            time.sleep(0.002)
        os.kill(os.getpid(), number)

    if rank == world - 1:
        threading.Thread(target=ask, daemon=True).start()
    if signal.getsignal(number) is signal.SIG_IGN:  # SIGINT, where the tests run in the background of a shell
        signal.signal(number, signal.SIG_DFL)
    before = signal.getsignal(number)
    try:
        train_all(rank, world, [values])
    except SystemExit as ended:
        assert signal.getsignal(number) is before
        stop()
        return int(ended.code or 0)
    return 0


def test_a_signal_on_one_rank_stops_all_with_a_checkpoint(tmp_path: Path) -> None:
    make_data(tmp_path / "data", edits=64)
    parts = make_parts(tmp_path / "parts", NANO)
    settings = {
        "train": {"steps": STEPS, "log_every": 2},
        "checkpoint": {"every": 1000, "keep": 2},
        "global_batch": 6,
        "data__task_block": 3,
        "parallel__micro_batch": 3,
    }
    whole, stopped = (
        phase_values(tmp_path / name, "align/joint", tmp_path / "data", parts, "nano", **settings)
        for name in ("whole", "stopped")
    )
    run_world(2, train_all, [whole], initialise=False)
    reached = 0
    for number in SIGNALS:
        codes = run_world(2, train_until, stopped, number, reached + 4, initialise=False)
        assert codes == [STOPPED, STOPPED]
        found = checkpoint.find(tmp_path / "stopped" / "checkpoints")
        assert found is not None
        step = int(found.name.rpartition("-")[2])
        assert len(curve(tmp_path / "stopped")) == step and reached + 4 <= step < STEPS
        reached = step
    run_world(2, train_all, [stopped], initialise=False)
    assert len(curve(tmp_path / "whole")) == STEPS and curve(tmp_path / "stopped") == curve(tmp_path / "whole")
    assert consumed(tmp_path / "stopped") == consumed(tmp_path / "whole")
