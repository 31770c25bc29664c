"""`cluster/submit_all.sh`: submit all phases of a folder of recipes as jobs that wait for those they start from."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from parallel.errors import UserError
from spar_scale.cluster import slurm
from spar_scale.config.recipe import load_folder
from spar_scale.phases import SIZES, parents_of, phase_of, shards_in

WORLD, WORLD_SCRIPT, SCORES, SCORES_SCRIPT = "world", "stage0_world.sh", "evaluate", "evaluate.sh"


@dataclass(frozen=True)
class Submission:
    """A job to submit: its name, its script with environment and arguments, and the jobs that it waits for.

    A job with `alone` gets one node, independently of the options for the others.
    """

    name: str
    script: str
    environment: Mapping[str, str]
    after: tuple[str, ...]
    words_behind: tuple[str, ...] = ()
    alone: bool = False

    def words(self, numbers: Mapping[str, str], logs: Path, options: Sequence[str]) -> list[str]:
        """Return the sbatch command, without its environment; `numbers` are the numbers of the earlier jobs."""
        wait = ":".join(numbers[name] for name in self.after)
        dependency = [f"--dependency=afterok:{wait}", "--kill-on-invalid-dep=yes"] if wait else []
        alone = ["--nodes=1"] if self.alone else []
        own = [f"--job-name=spar-{self.name}", f"--output={logs / '%x-%j.out'}", *dependency]
        return ["sbatch", "--parsable", *own, *options, *alone, f"cluster/{self.script}", *self.words_behind]


def submissions(folder: Path, root: Path) -> list[Submission]:
    """Return the jobs of a folder of recipes in order; the run directories are `root/PHASE`.

    For a folder with a world (`world.yaml`), the first job makes the data and the last one evaluates.
    """
    recipes = load_folder(folder)
    world = _file(folder, WORLD).exists()
    jobs = []
    if world:
        jobs.append(Submission(WORLD, WORLD_SCRIPT, _places(_file(folder, WORLD), root / "data"), (), alone=True))
    for phase, recipe in recipes.items():
        after = tuple(parent for parent in parents_of(recipe) if parent in recipes)
        shards = tuple(shards_in(recipe, root / "data")) if world else ()
        environment = _places(_file(folder, phase), root / phase)
        jobs.append(Submission(phase, phase_of(recipe).slurm_script, environment, (WORLD,) * world + after, shards))
    if world:
        few = ("--quick",) if folder.name == SIZES["smoke"] else ()
        jobs.append(Submission(SCORES, SCORES_SCRIPT, {"RUN_DIR": str(root)}, tuple(recipes), few, alone=True))
    return jobs


def submit(folder: Path, root: Path, options: Sequence[str], dry_run: bool) -> str:
    """Submit the chain with additional options of sbatch; return the job numbers, and how to follow and stop the jobs.

    With `dry_run` nothing is submitted, and the commands are returned. SIZE in the environment selects the miniature's
    size. Raises UserError for a folder without recipes, and if sbatch refuses a job; then the jobs that were submitted
    before are cancelled.
    """
    folder = _sized(folder, os.environ.get("SIZE", ""))
    chain, logs = submissions(folder, root), root / "logs"
    if dry_run:
        numbers = {job.name: f"${{{job.name}}}" for job in chain}
        return "\n".join(_line(job, job.words(numbers, logs, options)) for job in chain)
    logs.mkdir(parents=True, exist_ok=True)  # sbatch does not create the directory of its output
    numbers: dict[str, str] = {}
    try:
        for job in chain:
            line = ["env", *(f"{key}={value}" for key, value in job.environment.items())]
            numbers[job.name] = slurm.run_command(*line, *job.words(numbers, logs, options)).partition(";")[0]
    except UserError:
        if numbers:
            slurm.run_command("scancel", *numbers.values())
            print(f"cancelled the jobs submitted before: {', '.join(numbers.values())}", file=sys.stderr)
        raise
    return _summary(numbers, root)


def _summary(numbers: Mapping[str, str], root: Path) -> str:
    jobs = "\n".join(f"{number:>10}  {name}" for name, number in numbers.items())
    job_ids = ",".join(numbers.values())
    return (
        f"{jobs}\nfollow:  squeue --jobs={job_ids}\n         tail -f {root / 'logs'}/*.out\n"
        f"         make ui OUT={root}\nstop:    scancel {' '.join(numbers.values())}"
    )


def _line(job: Submission, words: Sequence[str]) -> str:
    environment = " ".join(f"{key}={shlex.quote(value)}" for key, value in job.environment.items())
    line = " ".join(word if "${" in word else shlex.quote(word) for word in words)
    return f"{job.name}=$({environment} {line})"


def _sized(folder: Path, size: str) -> Path:
    """Return the folder of the miniature's size, beside the given one."""
    if not size:
        return folder
    if size not in SIZES or folder.name not in SIZES.values():
        raise UserError(
            f"SIZE: found '{size}' with {folder}; must be {' or '.join(SIZES)}, with recipes of the miniature"
        )
    return folder.parent / SIZES[size]


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.yaml"


def _places(recipe: Path, run_dir: Path) -> dict[str, str]:
    return {"RECIPE": str(recipe), "RUN_DIR": str(run_dir)}
