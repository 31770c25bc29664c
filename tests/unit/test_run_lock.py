"""One process per run directory."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest
from launching import run_world

from parallel.errors import UserError
from parallel.launch.run_lock import RunLock


def _try(rank: int, size: int, run_dir: str) -> str:
    try:
        RunLock(Path(run_dir)).release()
    except UserError as error:
        return str(error)
    return "locked"


def _elsewhere(run_dir: Path) -> str:
    return run_world(1, _try, str(run_dir), initialise=False)[0]


def test_a_second_process_is_refused_and_told_who_holds_the_run(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run"):
        message = _elsewhere(tmp_path / "run")
        assert f"in use by process {os.getpid()} on {socket.gethostname()} since 2" in message
        assert _elsewhere(tmp_path / "run") == message  # being refused does not break the lock
    assert _elsewhere(tmp_path / "run") == "locked"


def test_the_same_process_is_refused_and_keeps_its_lock(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        with pytest.raises(UserError, match="by this process"):
            RunLock(tmp_path)
        assert "in use by process" in _elsewhere(tmp_path)


def _die_with_a_worker_left(rank: int, size: int, run_dir: str) -> int:
    """Fork a holder that forks a worker and is killed; return the worker's pid, alive."""
    read, write = os.pipe()
    holder = os.fork()
    if holder == 0:
        RunLock(Path(run_dir))
        worker = os.fork()
        if worker == 0:
            signal.pause()
        os.write(write, str(worker).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(holder, 0)
    return int(os.read(read, 20))


def test_a_killed_holder_frees_the_run_even_if_its_loader_workers_live_on(tmp_path: Path) -> None:
    (worker,) = run_world(1, _die_with_a_worker_left, str(tmp_path), initialise=False)
    try:
        os.kill(worker, 0)
        assert _elsewhere(tmp_path) == "locked"
    finally:
        os.kill(worker, signal.SIGKILL)


def test_an_unwritable_run_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run: Not a directory; run_dir must be a writable directory"):
        RunLock(tmp_path / "file" / "run")
