"""`cluster/submit_all.sh`: every phase of a folder of recipes as a job that waits for those it starts from."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from parallel.errors import UserError
from spar_scale.cluster import slurm
from spar_scale.config.recipe import load_recipe
from spar_scale.phases import SIZES, parents_of, phase_names, phase_of, shards_in

WORLD, WORLD_SCRIPT, SCORES, SCORES_SCRIPT = "world", "stage0_world.sh", "evaluate", "evaluate.sh"


@dataclass(frozen=True)
class Submission:
    """A job to come: its name, its script and what that finds in its environment, and the jobs that it waits for.

    One that works `alone` gets a node, whatever the others are given.
    """

    name: str
    script: str
    environment: Mapping[str, str]
    after: tuple[str, ...]
    words_behind: tuple[str, ...] = ()
    alone: bool = False

    def words(self, numbers: Mapping[str, str], logs: Path, options: Sequence[str]) -> list[str]:
        """The line that submits it, behind its environment; `numbers` are those of the jobs before."""
        wait = ":".join(numbers[name] for name in self.after)
        dependency = [f"--dependency=afterok:{wait}", "--kill-on-invalid-dep=yes"] if wait else []
        alone = ["--nodes=1"] if self.alone else []
        own = [f"--job-name=spar-{self.name}", f"--output={logs / '%x-%j.out'}", *dependency]
        return ["sbatch", "--parsable", *own, *options, *alone, f"cluster/{self.script}", *self.words_behind]


def submissions(folder: Path, root: Path) -> list[Submission]:
    """The jobs of a folder of recipes, in their order; runs go to `root/PHASE`.

    A folder with a world (`world.yaml`) brings its own data, made first, and scores at the end.
    """
    recipes = {phase: load_recipe(folder / f"{phase}.yaml") for phase in phase_names() if _file(folder, phase).exists()}
    if not recipes:
        raise UserError(f"{folder}: no recipe of a phase is there ({', '.join(phase_names())}, each with .yaml)")
    world = _file(folder, WORLD).exists()
    found = []
    if world:
        found.append(Submission(WORLD, WORLD_SCRIPT, _places(_file(folder, WORLD), root / "data"), (), alone=True))
    for phase, recipe in recipes.items():
        after = tuple(parent for parent in parents_of(recipe) if parent in recipes)
        shards = tuple(shards_in(recipe, root / "data")) if world else ()
        environment = _places(_file(folder, phase), root / phase)
        found.append(Submission(phase, phase_of(recipe).slurm_script, environment, (WORLD,) * world + after, shards))
    if world:
        few = ("--quick",) if folder.name == SIZES["smoke"] else ()
        found.append(Submission(SCORES, SCORES_SCRIPT, {"RUN_DIR": str(root)}, tuple(recipes), few, alone=True))
    return found


def submit(folder: Path, root: Path, options: Sequence[str], dry_run: bool) -> str:
    """Submit the chain with further options of sbatch; return the jobs' numbers, and how to follow and stop them.

    With `dry_run` nothing is submitted, and the lines that would be are returned. SIZE in the environment picks the
    miniature's size. Raises UserError for a folder without recipes and for what sbatch refuses; jobs that were
    submitted before that are cancelled.
    """
    folder = _sized(folder, os.environ.get("SIZE", ""))
    chain, logs = submissions(folder, root), root / "logs"
    if dry_run:
        numbers = {one.name: f"${{{one.name}}}" for one in chain}
        return "\n".join(_line(one, one.words(numbers, logs, options)) for one in chain)
    logs.mkdir(parents=True, exist_ok=True)  # sbatch makes no directory for its output
    numbers: dict[str, str] = {}
    try:
        for one in chain:
            line = ["env", *(f"{key}={value}" for key, value in one.environment.items())]
            numbers[one.name] = slurm.ask(*line, *one.words(numbers, logs, options)).partition(";")[0]
    except UserError:
        if numbers:
            slurm.ask("scancel", *numbers.values())
            print(f"cancelled what was submitted before: {', '.join(numbers.values())}", file=sys.stderr)
        raise
    return _summary(numbers, root)


def _summary(numbers: Mapping[str, str], root: Path) -> str:
    jobs = "\n".join(f"{number:>10}  {name}" for name, number in numbers.items())
    listed = ",".join(numbers.values())
    return (
        f"{jobs}\nfollow:  squeue --jobs={listed}\n         tail -f {root / 'logs'}/*.out\n"
        f"         make ui OUT={root}\nstop:    scancel {' '.join(numbers.values())}"
    )


def _line(one: Submission, words: Sequence[str]) -> str:
    environment = " ".join(f"{key}={shlex.quote(value)}" for key, value in one.environment.items())
    line = " ".join(word if "${" in word else shlex.quote(word) for word in words)
    return f"{one.name}=$({environment} {line})"


def _sized(folder: Path, size: str) -> Path:
    """The folder of the miniature's size, beside the one given."""
    if not size:
        return folder
    if size not in SIZES or folder.name not in SIZES.values():
        raise UserError(
            f"SIZE: found '{size}' with {folder}; must be {' or '.join(SIZES)}, for recipes of the miniature alone"
        )
    return folder.parent / SIZES[size]


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.yaml"


def _places(recipe: Path, run_dir: Path) -> dict[str, str]:
    return {"RECIPE": str(recipe), "RUN_DIR": str(run_dir)}
