"""Worlds of gloo processes for tests: `run_world(4, function, argument)` returns one result per rank.

Workers come from a fork server that has imported torch already, so a world of four starts in a
fraction of a second instead of ten. The rendezvous is a TCP store that the test process itself holds
on a port chosen by the system: no fixed ports, no race for a free one. A function is found again in
the worker by its file and name, so any function at the top level of a test module can run; its
arguments and its result must be picklable.

    from launching import preload, run_world
    preload("deepspeed")                    # at the top of a test module: imported once, before any fork

    def share(rank, world, factor): ...     # runs with torch.distributed initialised over gloo
    def test_shares(): assert run_world(2, share, 3) == [0, 3]
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

_FORK_SERVER = multiprocessing.get_context("forkserver")
_preloaded: list[str] = ["torch", "torch.distributed", "torch.distributed.checkpoint"]
_LAST = "freeze_imports"  # without it each world's collections of garbage go over all modules: 0.5 s in each process


class WorldError(Exception):
    """A world failed: which rank first and how.

    `rank` is the first rank known to have failed, `cause` its exception where it could be pickled,
    `exit_codes` what every process ended with (negative: the signal that ended it).
    """

    def __init__(self, rank: int, text: str, cause: BaseException | None = None) -> None:
        super().__init__(f"rank {rank}: {text}")
        self.rank = rank
        self.cause = cause
        self.exit_codes: list[int | None] = []


def preload(*modules: str) -> None:
    """Have the fork server import `modules` too; call it where a test module is imported (pytest collects first)."""
    for module in modules:
        if module not in _preloaded:
            _preloaded.append(module)


def run_world(
    size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_s: float = 300.0,
    initialise: bool = True,
    env: dict[str, str] | None = None,
) -> list[Any]:
    """Run `function(rank, size, *args)` in `size` processes and return their results in rank order.

    With `initialise` the default gloo group stands when the function starts and is taken down after it;
    without, only the environment of a launcher is there (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
    MASTER_PORT). `env` is added to the worker's environment before anything else.

    Raises `WorldError` as soon as a rank raises or dies, or when `timeout_s` seconds have passed; the
    other ranks are killed.
    """
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    _FORK_SERVER.set_forkserver_preload([*_preloaded, _LAST])
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    base = {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # every rank is a client of the store held here
        "TORCHELASTIC_RESTART_COUNT": "0",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        **(env or {}),
    }
    job = (function.__module__, function.__code__.co_filename, function.__qualname__, pickle.dumps(args))
    processes, pipes = [], []
    for rank in range(size):
        here, there = _FORK_SERVER.Pipe(duplex=False)
        environment = {**base, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = _FORK_SERVER.Process(
            target=_work, args=(rank, size, job, environment, initialise, timeout_s, there), daemon=True
        )
        process.start()
        there.close()
        processes.append(process)
        pipes.append(here)
    try:
        return _collect(pipes, time.monotonic() + timeout_s, timeout_s)
    except WorldError as error:
        _join(processes, grace_s=0.0)
        error.exit_codes = [process.exitcode for process in processes]
        if error.cause is not None:
            raise error from error.cause
        raise
    finally:
        _join(processes, grace_s=5.0)
        for pipe in pipes:
            pipe.close()


def start_process(function: Callable[..., Any], *args: Any) -> Any:
    """Start `function(*args)` in one process with no launcher's environment; the caller joins or kills it.

    Exit code 0 when it returned, 1 when it raised (traceback on stderr).
    """
    _FORK_SERVER.set_forkserver_preload([*_preloaded, _LAST])
    job = (function.__module__, function.__code__.co_filename, function.__qualname__, pickle.dumps(args))
    process = _FORK_SERVER.Process(target=_work_alone, args=job)
    process.start()
    return process


def run_command(words: list[str], folder: Path) -> None:
    """Run `spar-scale WORDS` in `folder`, alone and outside of any job, and require exit code 0."""
    process = start_process(_command, words, folder)
    process.join()
    assert process.exitcode == 0, f"spar-scale {' '.join(words)}: exit code {process.exitcode}"


def _command(words: list[str], folder: Path) -> None:
    from spar_scale.cli import main

    for name in [name for name in os.environ if name.startswith("SLURM")]:
        del os.environ[name]
    os.chdir(folder)
    raise SystemExit(main(words))


def _collect(pipes: list[Connection], deadline: float, timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    open_pipes = {pipe: rank for rank, pipe in enumerate(pipes)}
    while open_pipes:
        ready = wait(list(open_pipes), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            late = sorted(open_pipes.values())
            raise WorldError(late[0], f"no result within {timeout_s:g} s (late ranks: {late})")
        failures = []
        for pipe in ready:
            rank = open_pipes.pop(pipe)  # type: ignore[arg-type]
            try:
                good, value, text = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                good, value, text = False, None, "the process died without a result"
            if good:
                results[rank] = value
            else:
                failures.append(WorldError(rank, text, value))
        if failures:  # a rank whose peer vanished sees a RuntimeError: the other one is the origin
            raise min(failures, key=lambda failure: type(failure.cause) is RuntimeError)
    return [results[rank] for rank in range(len(pipes))]


def _join(processes: list[Any], grace_s: float) -> None:
    deadline = time.monotonic() + grace_s
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _work(
    rank: int, size: int, job: tuple, environment: dict[str, str], initialise: bool, timeout_s: float, pipe: Connection
) -> None:
    os.environ.update(environment)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        function, args = _find(*job)
        if initialise:
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
        message = (True, function(rank, size, *args), "")
        if initialise:
            dist.barrier()  # nobody tears the group down while another still uses it
            dist.destroy_process_group()
        payload = pickle.dumps(message)
    except BaseException as error:
        text = traceback.format_exc()
        try:
            payload = pickle.dumps((False, error, text))
            pickle.loads(payload)
        except Exception:
            payload = pickle.dumps((False, None, text))
    pipe.send_bytes(payload)
    pipe.close()


def _work_alone(module_name: str, file: str, qualified_name: str, pickled_args: bytes) -> None:
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    import torch

    torch.set_num_threads(1)
    function, args = _find(module_name, file, qualified_name, pickled_args)
    function(*args)


def _find(module_name: str, file: str, qualified_name: str, pickled_args: bytes) -> tuple[Callable[..., Any], tuple]:
    module = sys.modules.get(module_name)
    if module is None:
        spec = importlib.util.spec_from_file_location(module_name, Path(file))
        if spec is None or spec.loader is None:
            raise ImportError(f"{file} is not a module")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    target: Any = module
    for part in qualified_name.split("."):
        target = getattr(target, part)
    return target, pickle.loads(pickled_args)
