"""Access to SLURM through its own commands."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from parallel.errors import UserError

PATIENCE_S = 60
"""Timeout of a SLURM command; a busy controller, or one that fails over to its backup, responds within this time."""


@dataclass(frozen=True)
class Job:
    """The batch job of this process: its number, how often it was restarted, and its number of nodes."""

    id: str
    restarts: int
    nodes: int

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Job:
        """Return the job of an environment. Raises UserError outside a job."""
        if "SLURM_JOB_ID" not in environment:
            raise UserError(
                "SLURM_JOB_ID: not set, so this is not a SLURM job; submit a script of cluster/ with sbatch"
            )
        numbers = (environment.get(name) or "0" for name in ("SLURM_RESTART_COUNT", "SLURM_JOB_NUM_NODES"))
        restarts, nodes = map(int, numbers)
        return cls(environment["SLURM_JOB_ID"], restarts, max(1, nodes))

    def is_running(self) -> bool:
        """Return whether the job is running, that is, SLURM has not started to end it."""
        return self._field("JobState") == "RUNNING"

    def requeue(self, without: Collection[str] = ()) -> None:
        """Requeue the job under the same number, excluding the nodes `without`; SLURM then ends this process.

        Nodes are excluded after requeueing: SLURM 22.05 allows that for a pending job, not for a running one.
        """
        run_command("scontrol", "requeue", self.id)
        if without:
            before = self._field("ExcNodeList").replace("(null)", "")  # such as node[2,4-6], kept as it is
            run_command(
                "scontrol", "update", f"JobId={self.id}", f"ExcNodeList={','.join(filter(None, (before, *without)))}"
            )

    def _field(self, name: str) -> str:
        found = re.search(rf"\b{name}=(\S+)", run_command("scontrol", "-o", "show", "job", self.id))
        return found.group(1) if found else ""

    def note(self, text: str) -> None:
        """Store a text as the job's comment, which `scontrol show job` shows."""
        run_command("scontrol", "update", f"JobId={self.id}", f"Comment={text}")


def run_command(*words: str) -> str:
    """Run a SLURM command and return its output. Raises UserError with the command's message if it fails.

    The command ignores SIGTERM, because SLURM sends that to all processes of a job that has just been requeued.
    """
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=PATIENCE_S, check=False, preexec_fn=_ignore_sigterm
        )
    except FileNotFoundError:
        raise UserError(f"{words[0]}: not found; SLURM's commands must be on the PATH") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{words[0]}: SLURM has not responded for {PATIENCE_S} s") from None
    if done.returncode:
        raise UserError(f"{' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


def _ignore_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def srun(job: Job, words: Sequence[str], wait_s: float) -> subprocess.Popen[bytes]:
    """Start a command once on every node of the job, with all resources of the job there.

    Tasks that still run `wait_s` after the first has ended are killed. A failing task does not end the others at once:
    they may be saving, and their messages may show the cause.
    """
    nodes = str(job.nodes)
    options = ["--nodes", nodes, "--ntasks", nodes, "--ntasks-per-node=1", "--cpu-bind=none", "--kill-on-bad-exit=0"]
    return subprocess.Popen(["srun", *options, f"--wait={max(1, round(wait_s))}", *words])
