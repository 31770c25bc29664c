"""What the system asks of SLURM and tells it, through SLURM's own commands."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from parallel.errors import UserError

PATIENCE_S = 60
"""A controller that is busy, or changes over to its backup, answers within this."""


@dataclass(frozen=True)
class Job:
    """The batch job that this process belongs to: its number, how often it was started anew, how many nodes it has."""

    id: str
    restarts: int
    nodes: int

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Job:
        """The job; UserError outside of one."""
        if "SLURM_JOB_ID" not in environment:
            raise UserError("SLURM_JOB_ID: not set, so this is no job of SLURM; hand a script of cluster/ to sbatch")
        numbers = (environment.get(name) or "0" for name in ("SLURM_RESTART_COUNT", "SLURM_JOB_NUM_NODES"))
        restarts, nodes = map(int, numbers)
        return cls(environment["SLURM_JOB_ID"], restarts, max(1, nodes))

    def is_running(self) -> bool:
        """Whether SLURM lets it run on: not where it has begun to end it."""
        return self._field("JobState") == "RUNNING"

    def requeue(self, without: Collection[str] = ()) -> None:
        """Have it started anew, with this number, when nodes are free, but not on some; SLURM then ends this process.

        The nodes are taken out once it is queued: 22.05 allows it for a job that waits, not for one that runs.
        """
        ask("scontrol", "requeue", self.id)
        if without:
            before = self._field("ExcNodeList").replace("(null)", "")  # as node[2,4-6], which stays one word
            ask("scontrol", "update", f"JobId={self.id}", f"ExcNodeList={','.join(filter(None, (before, *without)))}")

    def _field(self, name: str) -> str:
        found = re.search(rf"\b{name}=(\S+)", ask("scontrol", "-o", "show", "job", self.id))
        return found.group(1) if found else ""

    def note(self, text: str) -> None:
        """Leave a text where `scontrol show job` shows it."""
        ask("scontrol", "update", f"JobId={self.id}", f"Comment={text}")


def ask(*words: str) -> str:
    """What a command of SLURM prints; UserError with its own words where it refuses.

    SIGTERM does not end it: SLURM sends that to all of a job which has just asked to be queued anew.
    """
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=PATIENCE_S, check=False, preexec_fn=_ignore_sigterm
        )
    except FileNotFoundError:
        raise UserError(f"{words[0]}: not found; SLURM's commands must be on the PATH") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{words[0]}: SLURM has not answered for {PATIENCE_S} s") from None
    if done.returncode:
        raise UserError(f"{' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


def _ignore_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def srun(job: Job, words: Sequence[str], wait_s: float) -> subprocess.Popen[bytes]:
    """Start a command once on every node of the job, with all that the job has there.

    Tasks that still run `wait_s` after the first has ended are killed. One that fails ends none at once: the others
    may be about to save, and say more about the cause than a kill would let them.
    """
    nodes = str(job.nodes)
    options = ["--nodes", nodes, "--ntasks", nodes, "--ntasks-per-node=1", "--cpu-bind=none", "--kill-on-bad-exit=0"]
    return subprocess.Popen(["srun", *options, f"--wait={max(1, round(wait_s))}", *words])
