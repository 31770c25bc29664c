"""The body of a training job: look at the nodes, train on them, then let go, go on later, or stop for good.

The batch process of sbatch is this program. `--signal=B:USR1@SECONDS` warns it before the time limit, and a preemption
by its signal; it passes that on, the ranks save at their next step and end, and the job asks to be started anew on
whatever nodes are left. SIGTERM means that SLURM itself ends the job (scancel, preemption, the limit), so then SLURM
decides what becomes of it. A job that was refused would be refused again and fails, with all that depends on it; so
does one that has been started anew too often without a new checkpoint. Every other end is worth another attempt.
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

FRUITLESS = 3
"""Attempts that may end one after another without a new checkpoint."""
PREFLIGHT_S = 300.0
"""From the first node that has been looked at to the last, a slow shared disk included."""
MARGIN_S = 60.0
"""Beyond `guards.timeout_s`, in which ranks end by themselves, until those that are left are killed."""
ENDING_S = 120.0
"""For SLURM to begin to end this process once the job is queued anew."""
ATTEMPTS = "attempts.json"
LOOK_S = 0.5


class Signals:
    """What SLURM has asked of this job, and the step that is to hear of it."""

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
    """How the run's attempts ended, kept in its directory: the step of the newest checkpoint after each."""

    def __init__(self, run_dir: Path):
        self._file = run_dir / ATTEMPTS
        self._checkpoints = run_dir / "checkpoints"
        self._ended: list[dict[str, int | str]] = (
            json.loads(self._file.read_text(encoding="utf-8")) if self._file.exists() else []
        )

    def step(self) -> int:
        """The step of the newest checkpoint, 0 without one."""
        return max((int(path.name.rpartition("-")[2]) for path in self._checkpoints.glob("step-*")), default=0)

    def add(self, job: Job, code: int) -> None:
        """Note the end of one."""
        self._ended.append({"job": job.id, "restart": job.restarts, "step": self.step(), "exit_code": code})
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_file(self._file, (json.dumps(self._ended, indent=1) + "\n"))

    def fruitless(self) -> int:
        """How many of the last ones ended at the newest checkpoint that there already was when they began."""
        steps = [0, *(int(ended["step"]) for ended in self._ended)]
        count = 0
        while count + 1 < len(steps) and steps[-1 - count] == steps[-2 - count]:
            count += 1
        return count


def run_job(recipe_file: Path, overrides: Sequence[str]) -> int:
    """Train a recipe on the nodes of this job; return its exit code. Raises UserError for a recipe that is refused."""
    recipe, job, signals = load_recipe(recipe_file, list(overrides)), Job.of_environment(), Signals()
    attempts = Attempts(recipe.run_dir)
    _announce(f"job {job.id}, attempt {job.restarts + 1} on {job.nodes} node(s), from step {attempts.step()}")
    words = [str(recipe_file), *overrides]
    code, unfit = _preflight(recipe, job, words, signals)
    if code == DONE and not signals.warned:
        code = _step(job, ["train", *words], signals, recipe.guards.timeout_s + MARGIN_S)
    if code != REFUSED:  # one that never began tells nothing of another job that may be training here
        attempts.add(job, code)
    return _conclude(job, attempts, signals, code, unfit)


def _step(job: Job, words: Sequence[str], signals: Signals, wait_s: float) -> int:
    """Run `spar-scale WORDS` on every node; return the highest exit code. `wait_s` is srun's."""
    program = [sys.executable, "-m", "spar_scale.cli", "cluster", "node", *words]
    signals.step = slurm.srun(job, program, wait_s)
    if signals.warned:  # between the last look and the start
        signals.step.send_signal(signal.SIGUSR1)
    return signals.step.wait()


def _preflight(recipe: Recipe, job: Job, words: Sequence[str], signals: Signals) -> tuple[int, list[str]]:
    """Look at every node; return the exit code and the nodes that are not fit, named here and in the job's comment.

    Where none is fit the nodes are not the cause, and the recipe is refused.
    """
    from spar_scale.doctor.preflight import bad_nodes, forget

    forget(recipe.run_dir)
    code = _step(job, ["doctor", *words], signals, PREFLIGHT_S)
    if code in (DONE, REFUSED) or signals.warned:
        return code, []
    hosts = slurm.ask("scontrol", "show", "hostnames").split()
    found = bad_nodes(recipe.run_dir, hosts)
    for host, text in found.items():
        _announce(f"{host} is not fit: {text}")
    if found:
        job.note(f"not fit: {', '.join(found)}")
    return (REFUSED, []) if len(found) == len(hosts) else (DEFECT, list(found))


def _conclude(job: Job, attempts: Attempts, signals: Signals, code: int, unfit: Sequence[str]) -> int:
    """What becomes of the job, by how its attempt ended."""
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
    if attempts.fruitless() >= FRUITLESS:
        told = f"{FRUITLESS} attempts have brought no new checkpoint"
        _announce(f"{told} (exit code {code}): correct what is reported above, then submit it again; the job ends here")
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
        time.sleep(LOOK_S)
    return code


def _announce(text: str) -> None:
    print(f"spar-scale: {text}", flush=True)
