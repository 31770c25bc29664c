"""The main program of a training job: check the nodes, train on them, then finish, requeue the job, or fail.

It runs as the batch process of sbatch. `--signal=B:USR1@SECONDS` makes SLURM send SIGUSR1 before the time limit, and a
preemption sends its signal. The program forwards it as SIGUSR1; the ranks save after their current step and exit, and
the job requeues itself, without bad nodes. SIGTERM means that SLURM itself ends the job (scancel, preemption, time
limit), so SLURM decides whether it is requeued. A job whose recipe is refused would be refused again, so it fails, with
all jobs that depend on it. It also fails after too many attempts without a new checkpoint. In all other cases the job
is requeued.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from parallel.errors import UserError
from parallel.files import write_file
from parallel.launch.exit_codes import DEFECT, DONE, REFUSED, STOPPED
from spar_scale.cluster import slurm
from spar_scale.cluster.slurm import Job
from spar_scale.config.recipe import Recipe, load_recipe

MAX_FRUITLESS = 3
"""The job fails after this many consecutive attempts without a new checkpoint."""
PREFLIGHT_S = 300.0
"""Longest time between the end of the first and of the last node's check; allows for a slow shared disk."""
MARGIN_S = 60.0
"""Ranks that still run this long after `guards.timeout_s`, when they should have ended themselves, are killed."""
ENDING_S = 120.0
"""Longest wait for SLURM to end this process after requeueing the job."""
ATTEMPTS = "attempts.json"
POLL_S = 0.5


class Signals:
    """The signals that SLURM has sent to this job; forwards them to the running job step."""

    def __init__(self) -> None:
        self.warned = self.ended = False
        self.step: subprocess.Popen[bytes] | None = None
        for name in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.warned, self.ended = True, self.ended or number != signal.SIGUSR1
        if self.step is not None and self.step.poll() is None:
            self.step.send_signal(signal.SIGUSR1)


class Attempts:
    """The history of the run's attempts, in a file of its directory: exit codes and newest checkpoints."""

    def __init__(self, run_dir: Path):
        self._file = run_dir / ATTEMPTS
        self._checkpoints = run_dir / "checkpoints"
        self._ended: list[dict[str, int | str]] = (
            json.loads(self._file.read_text(encoding="utf-8")) if self._file.exists() else []
        )

    def step(self) -> int:
        """Return the step of the newest checkpoint, 0 without one."""
        return max((int(path.name.rpartition("-")[2]) for path in self._checkpoints.glob("step-*")), default=0)

    def add(self, job: Job, code: int) -> None:
        """Record the end of an attempt."""
        self._ended.append({"job": job.id, "restart": job.restarts, "step": self.step(), "exit_code": code})
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_file(self._file, (json.dumps(self._ended, indent=1) + "\n"))

    def fruitless(self) -> int:
        """Return how many of the latest attempts ended without a new checkpoint."""
        steps = [0, *(int(ended["step"]) for ended in self._ended)]
        count = 0
        while count + 1 < len(steps) and steps[-1 - count] == steps[-2 - count]:
            count += 1
        return count


def run_job(recipe_file: Path, overrides: Sequence[str]) -> int:
    """Train a recipe on the nodes of this job; return the exit code. Raises UserError for a bad recipe."""
    recipe, job, signals = load_recipe(recipe_file, list(overrides)), Job.of_environment(), Signals()
    attempts = Attempts(recipe.run_dir)
    _announce(f"job {job.id}, attempt {job.restarts + 1} on {job.nodes} node(s), from step {attempts.step()}")
    words = [str(recipe_file), *overrides]
    code, unfit = _preflight(recipe, job, words, signals)
    if code == DONE:  # of the check; a warning that came during it leaves no time to train, and nothing is done then
        train = lambda: _step(job, ["train", *words], signals, recipe.guards.timeout_s + MARGIN_S)  # noqa: E731
        code = STOPPED if signals.warned else train()
    if code != REFUSED:  # a refused job did not train; the run directory may belong to another job that is training
        attempts.add(job, code)
    return _conclude(job, attempts, signals, code, unfit)


def _step(job: Job, words: Sequence[str], signals: Signals, wait_s: float) -> int:
    """Run `spar-scale WORDS` on every node; return the highest exit code. `wait_s` is srun's."""
    program = [sys.executable, "-m", "spar_scale.cli", "cluster", "node", *words]
    signals.step = slurm.srun(job, program, wait_s)
    if signals.warned:  # a signal that arrived before the step started was not forwarded
        signals.step.send_signal(signal.SIGUSR1)
    return signals.step.wait()


def _preflight(recipe: Recipe, job: Job, words: Sequence[str], signals: Signals) -> tuple[int, list[str]]:
    """Check every node; return the exit code and the bad nodes, which are also printed and noted in the job's comment.

    If all nodes are bad, the nodes are not the cause, and the job is refused.
    """
    from spar_scale.doctor.preflight import bad_nodes, forget

    forget(recipe.run_dir)
    code = _step(job, ["doctor", *words], signals, PREFLIGHT_S)
    if code in (DONE, REFUSED) or signals.warned:
        return code, []
    hosts = slurm.run_command("scontrol", "show", "hostnames").split()
    faults = bad_nodes(recipe.run_dir, hosts)
    for host, text in faults.items():
        _announce(f"{host} is not fit: {text}")
    if faults:
        job.note(f"not fit: {', '.join(faults)}")
    return (REFUSED, []) if len(faults) == len(hosts) else (DEFECT, list(faults))


def _conclude(job: Job, attempts: Attempts, signals: Signals, code: int, unfit: Sequence[str]) -> int:
    """Finish, requeue or fail the job, depending on how its attempt ended; return the exit code."""
    step = attempts.step()
    if code == DONE:
        _announce(f"done, at step {step}")
        return DONE
    if signals.ended or not job.is_running():
        _announce(f"ended by SLURM, which decides whether it is requeued; the newest checkpoint is of step {step}")
        return STOPPED
    if code == REFUSED:
        _announce("refused, for the reason above; the same job would be refused again")
        return REFUSED
    if attempts.fruitless() >= MAX_FRUITLESS:
        _announce(
            f"{MAX_FRUITLESS} attempts made no new checkpoint (exit code {code}); the job ends here: correct the error"
            " above, then submit it again"
        )
        return DEFECT
    without = f", without {', '.join(unfit)}" if unfit else ""
    _announce(f"ended with exit code {code}; resumes from step {step} when nodes are free{without}")
    try:
        job.requeue(unfit)
    except UserError as error:
        _announce(f"cannot be requeued: {error}; submit it again and it resumes from step {step}")
        return code
    until = time.monotonic() + ENDING_S
    while not signals.ended and time.monotonic() < until:
        time.sleep(POLL_S)
    return code


def _announce(text: str) -> None:
    print(f"spar-scale: {text}", flush=True)
