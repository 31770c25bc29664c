"""Join the world: rank, device and the default process group (`environment.py` reads the rank).

`start` creates the default process group once per process and returns a `Launch`. A process that was started without a
launcher has world size 1 and an in-memory store, so a laptop runs the same code as a cluster. Later calls in the same
process return the same world.
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
"""Default seconds that a rank waits for another."""
MARGIN_S = 5
"""Collectives time out this much later, so that the heartbeat, which can name the rank, reports first."""


@dataclass(frozen=True)
class Launch:
    """This process: global rank, world size, rank on the node, device."""

    rank: int
    world: int
    local_rank: int
    device: torch.device


def start(timeout_s: float = TIMEOUT_S) -> Launch:
    """Join the world as `meet` does, and start DeepSpeed."""
    launch = meet(timeout_s)
    # A CPU needs a hundred times as long for denormal numbers, which SiLU's gradient produces.
    torch.set_flush_denormal(True)
    os.environ["LOCAL_RANK"] = str(launch.local_rank)  # DeepSpeed's PipelineModule reads it (0.19.8)
    _start_deepspeed(launch.device)
    return launch


def meet(timeout_s: float = TIMEOUT_S) -> Launch:
    """Join the world; ranks wait `timeout_s` for each other.

    Raises UserError if the environment is incomplete, there are too few CUDA devices, or the ranks cannot meet.
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
    """Return the device type that `start` selects: "cuda" if torch sees a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def silenced() -> contextlib.AbstractContextManager[object]:
    """Return a context that discards what DeepSpeed 0.19.8 prints (axes, layers, memory)."""
    return contextlib.redirect_stdout(io.StringIO())


def stop() -> None:
    """Leave the world: destroy every process group of this process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _join(rank: int, world: int, backend: str, timeout_s: float) -> None:
    """Create the default process group."""
    timeout = datetime.timedelta(seconds=timeout_s + MARGIN_S)
    num_tasks = os.environ.get("SLURM_NTASKS", "1")
    if "RANK" not in os.environ and not is_task_of_srun(os.environ) and num_tasks != "1":
        log.warning(
            "SLURM gave this job %s tasks, but this process is not one of them: world size 1. Start all with srun",
            num_tasks,
        )
    if world == 1:  # no rendezvous, so a MASTER_ADDR that is left in the shell does not matter
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
            f"{place}: {world} processes could not meet there ({str(error).splitlines()[0]}); start all of them, and "
            "choose a port that is free on that host (MASTER_PORT)"
        ) from error


def _start_deepspeed(device: torch.device) -> None:
    """Import DeepSpeed for this device and make it use the existing process group."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import_deepspeed()
    import deepspeed
    import deepspeed.ops
    import deepspeed.utils

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed 0.19.8 uses names of collectives that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")

    if device.type == "cpu":
        # Asked for, this table tries the compiler for each operator, and has shared-memory collectives, which gloo does
        # not need, compiled for a minute (0.19.8).
        setattr(deepspeed.ops, "__compatible_ops__", {})  # noqa: B010
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
