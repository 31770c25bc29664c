"""Read rank, world size and rendezvous from the environment variables of torchrun or SLURM.

Under SLURM, the tasks of one srun are the world; torchrun's variables take precedence. A process without either has
world size 1, even if another launcher left MASTER_ADDR, MASTER_PORT or WORLD_SIZE in the shell. A batch script or the
shell of an allocation is not a task of srun, although SLURM also calls it task 0 of n: it has world size 1 and logs
that. Tasks meet at the first host of their job step. Its name is parsed from SLURM's host list here, because scontrol
is often missing in a container.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from parallel.errors import UserError

PORTS = range(20_000, 30_000)
"""Ports for the rendezvous of srun's tasks, unless MASTER_PORT is set; below the ephemeral ports of the system."""
BATCH_STEP = 0xFFFFFFF0
"""Steps of srun are numbered from 0; batch scripts and shells of an allocation have at least this number, or none."""


def read_environment(environment: Mapping[str, str] = os.environ) -> tuple[int, int, int]:
    """Return (rank, world, local rank) from torchrun's or SLURM's variables; (0, 1, 0) when neither is set.

    Raises UserError for variables that are missing, not whole numbers or contradictory, and for several processes
    without a rendezvous address.
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
    """Raise UserError for an invalid MASTER_ADDR or MASTER_PORT, or a missing one that is required."""
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
    """Return (host, port) of the rendezvous of srun's tasks: the step's first host, a port from the job number."""
    hosts = environment.get("SLURM_STEP_NODELIST", "")
    job, step = environment.get("SLURM_JOB_ID", ""), environment.get("SLURM_STEP_ID", "")
    first = re.match(r"(?:[\w.-]|\[\d[\d,-]*\])+(?=,|$)", hosts)
    if first is None or not job.isdecimal() or not step.isdecimal():
        raise UserError(
            f"SLURM_STEP_NODELIST/SLURM_JOB_ID/SLURM_STEP_ID: found {hosts!r}, {job!r}, {step!r}; a list of hosts as "
            "node[01-04] and two numbers are needed, or MASTER_ADDR and MASTER_PORT"
        )
    host = re.sub(r"\[(\d+)[^]]*\]", r"\1", first.group())  # the first host of node[003-006,9] is node003
    return host, PORTS[(10 * int(job) + int(step)) % len(PORTS)]  # a port per step: steps of a job may be concurrent


def rank_environment(rank: int, world: int, local_rank: int, local_world: int, host: str, port: int) -> dict[str, str]:
    """Return the variables that torchrun sets for a rank, for the launchers of this project."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(local_world),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
    }


def is_task_of_srun(environment: Mapping[str, str]) -> bool:
    """Return whether this process is a task of srun, and not the batch script or shell of an allocation."""
    step = environment.get("SLURM_STEP_ID", "")  # "-5" in some batch scripts
    return "SLURM_PROCID" in environment and step.isdecimal() and int(step) < BATCH_STEP
