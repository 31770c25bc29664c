"""The demo: make the miniature world, train all training stages, evaluate the model and write the report.

A size is a folder of recipes: `demo` uses recipes/tiny, `smoke` recipes/smoke, `full` recipes/full. The demo can be
interrupted at any time; the same command resumes it and adds to the time that was spent before.
"""

from __future__ import annotations

import contextlib
import functools
import json
import platform
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from parallel.files import write_file
from parallel.launch.children import sigterm_interrupts
from spar_scale.config.settings import load
from spar_scale.data.shapes_world import World
from spar_scale.evaluation.report import write_report
from spar_scale.evaluation.report.sources import read_scores
from spar_scale.files.outputs import make_directory
from spar_scale.phases import phase_names
from spar_scale.runs.board import clock
from spar_scale.runs.chain import COMPARED, STORED, Chain, data_step
from spar_scale.runs.processes import Step, available_cores, import_before_forks, run_steps, threads
from spar_scale.runs.spending import Spending, read_spending
from spar_scale.training.mlflow_sync import log_artifacts

PACKAGES = ("torch", "deepspeed", "transformers", "diffusers", "webdataset", "numpy", "pillow", "pydantic")
EVALUATION_S = 60.0  # estimated duration
EVALUATION, TRAINING, SCORES = "evaluation", "training.json", "scores.json"


@sigterm_interrupts()
def run(out: Path, size: str, seed: int, jobs: int | None = None) -> None:
    """Make the world under `out/data`, train every phase, write `training.json`, `scores.json` and `report.html`.

    `jobs` steps run at the same time (default: two, or one on a single core). Raises UserError for a size without
    recipes, and if a step refuses to run.
    """
    make_directory(out, "--out")
    jobs = jobs or min(2, available_cores())
    chain = Chain(out, size, seed)
    mirrored = any(chain.recipe(phase).tracking.mirror for phase in chain.phases)
    import_before_forks(mirrored)
    steps, total_spending = steps_of(chain, size), Spending(out)

    def write_results(step: Step | None = None) -> None:
        total_spending.record()
        _write(out / TRAINING, _training_record(chain, size, jobs, steps))
        if step is not None and step.name == EVALUATION:
            _write(out / SCORES, read_scores(out) | _core_seconds(steps))

    write_results()
    run_steps(steps, jobs, ended=write_results)
    write_results()
    report = write_report(out)
    if mirrored:
        log_artifacts(out, [report, out / SCORES, *sorted((out / EVALUATION).glob("*.png"))])
    for name, value in read_scores(out).items():
        print(f"{name:42} {value}")
    total, wall = _core_seconds(steps)["core_seconds.total"], clock(read_spending(out).wall_seconds)
    print(f"{total:.0f} core-seconds of training; {wall} in total, with evaluation and report\n{report}")


def steps_of(chain: Chain, size: str) -> list[Step]:
    """Return all steps of the demo, each after the steps that it depends on."""
    out, world = chain.out, load(chain.folder / "world.yaml", World)
    scored = out / "evaluation"

    def is_scored() -> bool:
        return read_spending(scored).finished and (out / SCORES).exists()

    trained = chain.steps()
    after = tuple(step.name for step in trained)
    return [
        data_step(world, out),
        *trained,
        Step(EVALUATION, scored, functools.partial(_evaluate, out, size), after, EVALUATION_S, is_scored),
    ]


def command(out: Path, size: str, seed: int) -> str:
    """Return the command that starts or resumes this demo."""
    return shlex.join(["spar-scale", "demo", "--out", str(out), "--size", size, "--seed", str(seed)])


def _training_record(chain: Chain, size: str, jobs: int, steps: Sequence[Step]) -> dict[str, Any]:
    """Return the content of `training.json`: command, machine, versions, and the time of each step so far."""
    trained = {phase: chain.recipe(phase).train.steps for phase in chain.phases}
    trained[chain.run_dir(*COMPARED).name] = trained[COMPARED[0]]
    return {
        "command": command(chain.out, size, chain.seed),
        "size": size,
        "seed": chain.seed,
        "jobs": jobs,
        "machine": f"{platform.system()} {platform.machine()}, {available_cores()} cores",
        "threads": threads(jobs),
        "versions": {"python": platform.python_version(), **_versions()},
        "wall_seconds": read_spending(chain.out).wall_seconds,
        "phases": {
            step.name: {"steps": trained.get(step.name, 0), **asdict(read_spending(step.folder))} for step in steps
        },
    }


def _core_seconds(steps: Sequence[Step]) -> dict[str, float]:
    """Return the core-seconds of each step, and the total of all steps that the final model needs."""
    costs = {step.name: read_spending(step.folder).core_seconds for step in steps if step.name != EVALUATION}
    costs["total"] = round(sum(costs[name] for name in costs if name in ("data", STORED, *phase_names())), 2)
    return {f"core_seconds.{name}": value for name, value in costs.items()}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, (json.dumps(content, indent=1) + "\n"))


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _evaluate(root: Path, size: str) -> None:
    from spar_scale.evaluation.evaluate import QUICK, Counts, evaluate

    evaluate(root, QUICK if size == "smoke" else Counts())
