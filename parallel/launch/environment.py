"""Who am I: rank, world and rendezvous, from torchrun's or SLURM's environment or alone.

Under SLURM the tasks of one srun are the world, and torchrun's variables go before SLURM's. A process without either
is a world of one, whatever MASTER_ADDR, MASTER_PORT or WORLD_SIZE another launcher has left in the shell. A batch
script itself, or the shell of an allocation, is no such task, though SLURM calls it task 0 of n as well: it is a world
of one, and says so. Tasks meet at the first host of their step. Its name is read out of SLURM's list by hand, a line,
because scontrol is often missing in a container.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from parallel.errors import UserError

PORTS = range(20_000, 30_000)
"""Where the tasks of an srun meet, unless MASTER_PORT is set: below the ports that systems hand out by themselves."""
BATCH_STEP = 0xFFFFFFF0
"""SLURM numbers the steps of srun from 0; a batch script and the shell of an allocation have one from here, or none."""


def read_environment(environment: Mapping[str, str] = os.environ) -> tuple[int, int, int]:
    """Return (rank, world, local rank) from torchrun's or SLURM's variables; (0, 1, 0) when neither is set.

    Raises UserError for variables that are missing, are no whole numbers or contradict each other, and for a world
    of several processes without a place to meet.
    """
    if "RANK" in environment:
        names, launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), "start all processes with torchrun, or unset RANK"
    elif is_task_of_srun(environment):
        names, launcher = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"), "start all processes with srun"
    else:
        return 0, 1, 0
    found = " ".join(f"{name}={environment[name]}" for name in names if name in environment)
    if missing := [name for name in names if name not in environment]:
        raise UserError(f"the environment sets {found} but not {', '.join(missing)}; {launcher}")
    if not all(re.fullmatch(r"-?[0-9]+", environment[name]) for name in names):
        raise UserError(f"{'/'.join(names)}: found {found}, must be whole numbers; {launcher}")
    rank, world, local_rank = (int(environment[name]) for name in names)
    if not 0 <= local_rank <= rank < world:
        rule = f"0 <= {names[2]} <= {names[0]} < {names[1]}"
        raise UserError(f"{'/'.join(names)}: found {found}, must be {rule}; {launcher}")
    if world > 1:
        _check_meeting_place(environment, required="RANK" in environment)
    return rank, world, local_rank


def _check_meeting_place(environment: Mapping[str, str], required: bool) -> None:
    """Raise UserError for a MASTER_ADDR or MASTER_PORT that cannot be used, or is not there but required."""
    found = {name: environment[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in environment}
    if required and (missing := {"MASTER_ADDR", "MASTER_PORT"} - set(found)):
        raise UserError(
            f"the environment sets WORLD_SIZE={environment['WORLD_SIZE']} but not {', '.join(sorted(missing))}, where "
            "the processes meet; start all processes with torchrun, or set both"
        )
    if found.get("MASTER_ADDR") == "":
        raise UserError("MASTER_ADDR: found an empty text, must be the name or address of the host of rank 0")
    port = found.get("MASTER_PORT", "1")
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise UserError(f"MASTER_PORT: found '{port}', must be the number of a port, 1 to 65535")


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


def rank_environment(rank: int, world: int, local_rank: int, local_world: int, host: str, port: int) -> dict[str, str]:
    """What torchrun sets for a rank, for launchers of our own."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(local_world),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
    }


def is_task_of_srun(environment: Mapping[str, str]) -> bool:
    """Whether this process is one of the tasks of an srun, and not the batch script or shell of its allocation."""
    step = environment.get("SLURM_STEP_ID", "")  # "-5" in some batch scripts
    return "SLURM_PROCID" in environment and step.isdecimal() and int(step) < BATCH_STEP
