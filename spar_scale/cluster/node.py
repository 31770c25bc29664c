"""The launcher of a node: starts one process per GPU, each a rank of the job's world.

It replaces torchrun (2.13) for two reasons: torchrun dies of SIGUSR1, SLURM's warning signal, and it turns every exit
code into 1, so the job could not decide whether to continue. This launcher forwards the signal and returns the codes.
SLURM itself starts the launchers, detects a lost node and restarts the job.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from parallel.errors import UserError, nearest
from parallel.launch.children import end_with_parent
from parallel.launch.environment import rank_environment, rendezvous
from parallel.launch.exit_codes import REFUSED, SIGNALLED, STOPPED

DEVICES = ("cuda", "cpu")
GRACE_S = 60.0
"""Time for the other ranks of a node to end after a failure; normally the heartbeat ends them sooner."""
POLL_S = 0.2


def run_node(words: Sequence[str], environment: Mapping[str, str] = os.environ) -> int:
    """Run `spar-scale WORDS` as the ranks of this node; return one exit code for all of them.

    SIGUSR1, SIGTERM and SIGINT are forwarded to the ranks as SIGUSR1, on which they save and stop. Raises UserError
    outside srun, or if the job has no GPU.
    """
    ranks = [dict(environment) | own for own in rank_environments(environment)]
    processes: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(signal.SIGUSR1)

    for name in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(name, pass_on)
    for own in ranks:
        line = [sys.executable, "-m", "spar_scale.cli", *words]
        processes.append(subprocess.Popen(line, env=own, preexec_fn=_begin_rank))
    return joint_code(_wait(processes))


def rank_environments(environment: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the environment variables of each rank of this node, in addition to the launcher's."""
    try:
        node, nodes = int(environment["SLURM_NODEID"]), int(environment["SLURM_STEP_NUM_NODES"])
    except (KeyError, ValueError):
        raise UserError("SLURM_NODEID, SLURM_STEP_NUM_NODES: not set; start this with srun, once per node") from None
    device, count = processes_per_node(environment)
    host, port = rendezvous(environment)
    given = {name: environment[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in environment}
    hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if device == "cpu" else {}
    return [
        rank_environment(node * count + local, nodes * count, local, count, host, port) | given | hidden
        for local in range(count)
    ]


def processes_per_node(environment: Mapping[str, str]) -> tuple[str, int]:
    """Return (device, processes): one process per GPU of the job, or SPAR_PROCESSES with SPAR_DEVICE=cpu."""
    device = environment.get("SPAR_DEVICE", "cuda")
    if device not in DEVICES:
        raise UserError(f"SPAR_DEVICE: found '{device}', must be cuda or cpu{nearest(device, DEVICES)}")
    if device == "cpu":
        return device, _count("SPAR_PROCESSES", environment.get("SPAR_PROCESSES", "1"))
    visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if not visible:
        raise UserError(
            "CUDA_VISIBLE_DEVICES: SLURM gave this job no GPU; request GPUs (sbatch --gres=gpu:8) or set"
            " SPAR_DEVICE=cpu"
        )
    return device, len(visible)


def joint_code(codes: Sequence[int]) -> int:
    """Return one exit code for all ranks: a refusal has the highest priority, then a failure, then a requested stop."""
    distinct = {code if code >= 0 else SIGNALLED - code for code in codes}
    if REFUSED in distinct:
        return REFUSED
    failures = distinct - {0, STOPPED}
    return max(failures) if failures else max(distinct)


def _count(name: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{name}: found '{text}', must be a whole number of at least 1")
    return int(text)


def _begin_rank() -> None:
    """Make the rank end with the launcher, and block SIGUSR1 until the rank handles it."""
    end_with_parent()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Return the exit codes of all processes; after a failure, the others are killed when GRACE_S is over."""
    until = float("inf")
    while any(process.poll() is None for process in processes):
        time.sleep(POLL_S)
        if any(process.returncode not in (None, 0, STOPPED) for process in processes):
            until = min(until, time.monotonic() + GRACE_S)
        if time.monotonic() > until:
            for process in processes:
                if process.poll() is None:
                    process.kill()
    return [process.wait() for process in processes]
