"""One launcher for each node: a process for each GPU of it, ranks of the job's world.

Where torchrun (2.13) stands elsewhere, for two reasons: it dies of SIGUSR1, by which SLURM warns, and it makes every
exit code 1, of which a job could not tell whether to go on. This one hands the signal on and the codes back. SLURM
itself starts the launchers, sees a lost node and decides what runs again.
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
"""From a rank's failure for the others of its node: a heartbeat ends them sooner, but one that never began cannot."""
LOOK_S = 0.2


def run_node(words: Sequence[str], environment: Mapping[str, str] = os.environ) -> int:
    """Run `spar-scale WORDS` as the ranks of this node; return one exit code for all of them.

    SIGUSR1, SIGTERM and SIGINT all reach the ranks as SIGUSR1: save and stop. Raises UserError outside of srun, or
    where no process can be started because no GPU was asked for.
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
    """What each rank of this node finds in its environment, beside what the launcher has."""
    try:
        node, nodes = int(environment["SLURM_NODEID"]), int(environment["SLURM_STEP_NUM_NODES"])
    except (KeyError, ValueError):
        raise UserError("SLURM_NODEID, SLURM_STEP_NUM_NODES: not there; srun starts this, once on each node") from None
    device, count = processes_per_node(environment)
    host, port = rendezvous(environment)
    given = {name: environment[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in environment}
    hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if device == "cpu" else {}
    return [
        rank_environment(node * count + local, nodes * count, local, count, host, port) | given | hidden
        for local in range(count)
    ]


def processes_per_node(environment: Mapping[str, str]) -> tuple[str, int]:
    """Return (device, processes): one for each GPU that SLURM has given, with SPAR_DEVICE=cpu SPAR_PROCESSES."""
    device = environment.get("SPAR_DEVICE", "cuda")
    if device not in DEVICES:
        raise UserError(f"SPAR_DEVICE: found '{device}', must be cuda or cpu{nearest(device, DEVICES)}")
    if device == "cpu":
        return device, _count("SPAR_PROCESSES", environment.get("SPAR_PROCESSES", "1"))
    visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if not visible:
        raise UserError(
            "CUDA_VISIBLE_DEVICES: SLURM gave this job no GPU; ask for it (sbatch --gres=gpu:8), or SPAR_DEVICE=cpu"
        )
    return device, len(visible)


def joint_code(codes: Sequence[int]) -> int:
    """One exit code for all ranks: a refusal before all, and a failure before a stop that was asked for."""
    found = {code if code >= 0 else SIGNALLED - code for code in codes}
    if REFUSED in found:
        return REFUSED
    failures = found - {0, STOPPED}
    return max(failures) if failures else max(found)


def _count(name: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{name}: found '{text}', must be a whole number from 1")
    return int(text)


def _begin_rank() -> None:
    """End with the launcher; keep SIGUSR1 waiting until the rank listens to it."""
    end_with_parent()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Exit codes of all; where one fails, the others are killed when their time is over."""
    until = float("inf")
    while any(process.poll() is None for process in processes):
        time.sleep(LOOK_S)
        if any(process.returncode not in (None, 0, STOPPED) for process in processes):
            until = min(until, time.monotonic() + GRACE_S)
        if time.monotonic() > until:
            for process in processes:
                if process.poll() is None:
                    process.kill()
    return [process.wait() for process in processes]
