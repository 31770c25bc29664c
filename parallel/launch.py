"""Who am I: rank, world and rendezvous, from torchrun's or SLURM's environment or alone.

One entry, `start`, makes the default process group once per process and hands out a `Launch`. A
process started by hand is a world of one with an in-memory store, so the laptop runs the same code
as the cluster. Later calls in the same process return the same world.

Under SLURM the tasks of one srun are the world, and torchrun's variables go before SLURM's. A batch script itself, or
the shell of an allocation, is no such task, though SLURM calls it task 0 of n as well: it is a world of one, and says
so. Tasks meet at the first host of their step. Its name is read out of SLURM's list by hand, a line, because scontrol
is often missing in a container.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import logging
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from parallel.errors import UserError

log = logging.getLogger(__name__)

TIMEOUT_S = 600
"""Seconds that a rank waits for another."""
PORTS = range(20_000, 30_000)
"""Where the tasks of an srun meet, unless MASTER_PORT is set: below the ports that systems hand out by themselves."""
BATCH_STEP = 0xFFFFFFF0
"""SLURM numbers the steps of srun from 0; a batch script and the shell of an allocation have one from here, or none."""
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
    torch.set_flush_denormal(True)  # a CPU takes a hundred times as long for them; SiLU's gradient ends in them
    os.environ["LOCAL_RANK"] = str(local_rank)  # DeepSpeed's PipelineModule reads it (0.19.8)
    _start_deepspeed(device)
    return Launch(dist.get_rank(), dist.get_world_size(), local_rank, device)


def device_type() -> str:
    """The kind of device that `start` gives to this process: "cuda" where torch sees a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def read_environment(environment: Mapping[str, str] = os.environ) -> tuple[int, int, int]:
    """Return (rank, world, local rank) from torchrun's or SLURM's variables; (0, 1, 0) when neither is set."""
    if "RANK" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif _is_task_of_srun(environment):
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    else:
        return 0, 1, 0
    found = {name: environment[name] for name in names if name in environment}
    if missing := sorted(set(names) - set(found)):
        raise UserError(
            f"the environment sets {sorted(found)} but not {missing}; start with torchrun, srun, or neither"
        )
    try:
        rank, world, local_rank = (int(value) for value in found.values())
    except ValueError:
        raise UserError(f"{'/'.join(names)}: found {found}, whole numbers are needed") from None
    return rank, world, local_rank


def rendezvous(environment: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Return (host, port) where the tasks of an srun meet: the first host of the step, a port from the job's number."""
    hosts = environment.get("SLURM_STEP_NODELIST", "")
    job, step = environment.get("SLURM_JOB_ID", ""), environment.get("SLURM_STEP_ID", "")
    first = re.match(r"(?:[\w.-]|\[\d[\d,-]*\])+(?=,|$)", hosts)
    if first is None or not job.isdecimal() or not step.isdecimal():
        raise UserError(
            f"SLURM_STEP_NODELIST/SLURM_JOB_ID/SLURM_STEP_ID: found {hosts!r}, {job!r}, {step!r}; a list of hosts as "
            "node[01-04] and two numbers are needed, or MASTER_ADDR and MASTER_PORT"
        )
    host = re.sub(r"\[(\d+)[^]]*\]", r"\1", first.group())  # node[003-006,9] begins with node003
    return host, PORTS[(10 * int(job) + int(step)) % len(PORTS)]  # steps of a job may run side by side


def silenced() -> contextlib.AbstractContextManager[object]:
    """A context in which DeepSpeed 0.19.8's bare prints (axes, layers, memory) go nowhere."""
    return contextlib.redirect_stdout(io.StringIO())


def stop() -> None:
    """Leave the world: destroys every process group of this process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _is_task_of_srun(environment: Mapping[str, str]) -> bool:
    step = environment.get("SLURM_STEP_ID", "")  # "-5" in some batch scripts
    return "SLURM_PROCID" in environment and step.isdecimal() and int(step) < BATCH_STEP


def _join(rank: int, world: int, backend: str, timeout_s: float) -> None:
    """Make the default process group."""
    timeout = datetime.timedelta(seconds=timeout_s + MARGIN_S)
    num_tasks = os.environ.get("SLURM_NTASKS", "1")
    if "RANK" not in os.environ and not _is_task_of_srun(os.environ) and num_tasks != "1":
        log.warning(
            "SLURM gave this job %s tasks, but this process is none of them and trains alone; srun starts all",
            num_tasks,
        )
    if world == 1 and "MASTER_ADDR" not in os.environ:
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
    import deepspeed
    import deepspeed.ops
    import deepspeed.utils

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed 0.19.8 calls collectives by the names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")

    if device.type == "cpu":
        # Skips a minute of compiling shared-memory collectives that gloo does not need (0.19.8).
        getattr(deepspeed.ops, "__compatible_ops__")["deepspeed_shm_comm"] = False  # noqa: B009
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
