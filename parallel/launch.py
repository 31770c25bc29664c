"""Who am I: rank, world and rendezvous, from torchrun's or SLURM's environment or alone.

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
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from parallel.errors import UserError

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
    """Join the world; raises UserError when the environment is half set or CUDA devices are too few."""
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
        timeout = datetime.timedelta(seconds=timeout_s + MARGIN_S)
        backend = "nccl" if device.type == "cuda" else "gloo"
        if world == 1 and "MASTER_ADDR" not in os.environ:
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        else:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
            dist.init_process_group(backend, timeout=timeout)
    torch.set_flush_denormal(True)  # a CPU takes a hundred times as long for them; SiLU's gradient ends in them
    os.environ["LOCAL_RANK"] = str(local_rank)  # DeepSpeed's PipelineModule reads it (0.19.8)
    _start_deepspeed(device)
    return Launch(dist.get_rank(), dist.get_world_size(), local_rank, device)


def device_type() -> str:
    """The kind of device that `start` gives to this process: "cuda" where torch sees a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def read_environment(environment: Mapping[str, str] = os.environ) -> tuple[int, int, int]:
    """Return (rank, world, local rank) from torchrun's or SLURM's variables; (0, 1, 0) when neither is set."""
    torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    slurm = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    for names in (torchrun, slurm):
        given = [name for name in names if name in environment]
        if names is slurm and "SLURM_PROCID" not in given:
            return 0, 1, 0  # inside an allocation but not started by srun
        if len(given) == len(names):
            try:
                rank, world, local_rank = (int(environment[name]) for name in names)
            except ValueError:
                found = {name: environment[name] for name in names}
                raise UserError(f"{'/'.join(names)}: found {found}, whole numbers are needed") from None
            return rank, world, local_rank
        if given and names is torchrun and "RANK" in given:
            missing = sorted(set(names) - set(given))
            raise UserError(f"the environment sets {given} but not {missing}; start with torchrun, srun, or neither")
    return 0, 1, 0


def silenced() -> contextlib.AbstractContextManager[object]:
    """A context in which DeepSpeed 0.19.8's bare prints (axes, layers, memory) go nowhere."""
    return contextlib.redirect_stdout(io.StringIO())


def stop() -> None:
    """Leave the world: destroys every process group of this process."""
    if dist.is_initialized():
        dist.destroy_process_group()


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
