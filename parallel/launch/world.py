"""This process in its world: rank, device and the default process group (`environment.py` tells who it is).

One entry, `start`, makes the default process group once per process and hands out a `Launch`. A
process started by hand is a world of one with an in-memory store, so the laptop runs the same code
as the cluster. Later calls in the same process return the same world.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import logging
import os
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist

from parallel.errors import UserError
from parallel.launch.environment import is_task_of_srun, read_environment, rendezvous
from parallel.launch.imports import import_deepspeed

log = logging.getLogger(__name__)

TIMEOUT_S = 600
"""Seconds that a rank waits for another."""
MARGIN_S = 5
"""Seconds by which a collective gives up later than that: the heartbeat, which can name a rank, speaks first."""


@dataclass(frozen=True)
class Launch:
    """This process in the world: global rank, number of processes, rank on the node, its device."""

    rank: int
    world: int
    local_rank: int
    device: torch.device


def start(timeout_s: float = TIMEOUT_S) -> Launch:
    """Join the world as `meet` does, with DeepSpeed."""
    launch = meet(timeout_s)
    torch.set_flush_denormal(True)  # a CPU takes a hundred times as long for them; SiLU's gradient ends in them
    os.environ["LOCAL_RANK"] = str(launch.local_rank)  # DeepSpeed's PipelineModule reads it (0.19.8)
    _start_deepspeed(launch.device)
    return launch


def meet(timeout_s: float = TIMEOUT_S) -> Launch:
    """Join the world, where ranks wait so long for each other.

    Raises UserError when the environment is half set, CUDA devices are too few, or the ranks cannot meet.
    """
    rank, world, local_rank = read_environment()
    device = torch.device("cpu")
    if device_type() == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK: found {local_rank}, but this node shows {torch.cuda.device_count()} GPU(s); "
                "start at most one process per GPU"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _join(rank, world, "nccl" if device.type == "cuda" else "gloo", timeout_s)
    return Launch(dist.get_rank(), dist.get_world_size(), local_rank, device)


def device_type() -> str:
    """The kind of device that `start` gives to this process: "cuda" where torch sees a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def silenced() -> contextlib.AbstractContextManager[object]:
    """A context in which DeepSpeed 0.19.8's bare prints (axes, layers, memory) go nowhere."""
    return contextlib.redirect_stdout(io.StringIO())


def stop() -> None:
    """Leave the world: destroys every process group of this process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _join(rank: int, world: int, backend: str, timeout_s: float) -> None:
    """Make the default process group."""
    timeout = datetime.timedelta(seconds=timeout_s + MARGIN_S)
    num_tasks = os.environ.get("SLURM_NTASKS", "1")
    if "RANK" not in os.environ and not is_task_of_srun(os.environ) and num_tasks != "1":
        log.warning(
            "SLURM gave this job %s tasks, but this process is none of them and trains alone; srun starts all",
            num_tasks,
        )
    if world == 1:  # it meets nobody, so a MASTER_ADDR that is left in the shell does not matter
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    if "RANK" not in os.environ and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        host, port = rendezvous()
        os.environ.setdefault("MASTER_ADDR", host)
        os.environ.setdefault("MASTER_PORT", str(port))
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    try:
        dist.init_process_group(backend, timeout=timeout)
    except dist.DistError as error:
        place = f"MASTER_ADDR={os.environ.get('MASTER_ADDR')} MASTER_PORT={os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"{place}: {world} processes could not meet there ({str(error).splitlines()[0]}); all must be started, and "
            "the port be free on that host: MASTER_PORT names another"
        ) from error


def _start_deepspeed(device: torch.device) -> None:
    """Import DeepSpeed for this device and let it adopt the process group."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import_deepspeed()
    import deepspeed
    import deepspeed.ops
    import deepspeed.utils

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed 0.19.8 calls collectives by the names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")

    if device.type == "cpu":
        # Asked for, this table tries the compiler for each operator, and has shared-memory collectives, which gloo does
        # not need, compiled for a minute (0.19.8).
        setattr(deepspeed.ops, "__compatible_ops__", {})  # noqa: B010
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
