"""Check on this machine that a recipe gives the same run under every layout, and when it is saved under one layout and
resumed under another.

Each layout trains the recipe for a few steps in its own world of forked processes, with the normal trainer. Its curve
is compared with that of one process. To measure only the arithmetic of a layout, every run uses fp32 and AdamW,
whatever the recipe says. Two options have wider bounds: Muon, whose Newton-Schulz iteration runs in half precision on a
GPU, and bf16, whose bounds are twice the measured distance between one process and two. The trade-off: all processes
share this machine, so a large recipe must be made small with overrides.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from parallel.errors import UserError, nearest
from parallel.optimizers import OPTIMIZERS
from spar_scale.config.recipe import Recipe, load_recipe
from spar_scale.files.outputs import make_directory
from spar_scale.models.sharding import check_tensor
from spar_scale.runs.curves import LOSS_FLOOR, LOSS_RELATIVE, NORM_RELATIVE, Curve, curve, distance
from spar_scale.runs.processes import import_before_forks, threads
from spar_scale.runs.ranks import run_ranks
from spar_scale.stages.parts import preset_of
from spar_scale.training.trainer import train

MOST = 8
"""World size of the largest layout."""
MUON = (10 * LOSS_RELATIVE, 10 * NORM_RELATIVE)
"""Bounds for runs with Muon: wide enough for an element of an update that rounds differently in half precision."""


@dataclass(frozen=True)
class ParityLayout:
    """A layout with its data-parallel size."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    zero: int = 1

    @property
    def processes(self) -> int:
        """World size."""
        return self.tensor * self.pipeline * self.data

    @property
    def name(self) -> str:
        """Its name: the sizes above 1, and the ZeRO stage if several are possible, such as "tp2-dp2-z3"."""
        sizes = {"tp": self.tensor, "pp": self.pipeline, "dp": self.data}
        parts = [f"{axis}{size}" for axis, size in sizes.items() if size > 1] or ["dp1"]
        return "-".join([*parts, *([f"z{self.zero}"] if len(self.zero_stages) > 1 else [])])

    @property
    def zero_stages(self) -> tuple[int, ...]:
        """The ZeRO stages that are tested with these sizes: only 1 with a pipeline or without data parallelism."""
        return (1, 2, 3) if self.pipeline == 1 and (self.data > 1 or self.tensor == 1) else (1,)

    def changes(self) -> list[str]:
        """Return the overrides that give a recipe this layout."""
        sizes = {"tensor": self.tensor, "pipeline": self.pipeline, "zero": self.zero}
        return [f"parallel.{key}={value}" for key, value in sizes.items()]


def _all_layouts() -> Iterator[ParityLayout]:
    sizes = range(1, MOST + 1)
    for processes in sizes:
        for tensor in sizes:
            for pipeline in sizes:
                data, rest = divmod(processes, tensor * pipeline)
                if rest == 0 and data > 0:
                    zero_stages = ParityLayout(tensor, pipeline, data).zero_stages
                    yield from (ParityLayout(tensor, pipeline, data, zero) for zero in zero_stages)


PARITY_LAYOUTS = {layout.name: layout for layout in _all_layouts()}
"""Name -> layout, for every layout of up to MOST processes."""
USUAL = [name for name, layout in PARITY_LAYOUTS.items() if layout.processes in (1, 2, 4)]
"""The layouts of `--layouts all`."""
SERIAL, REFERENCE_BF16 = PARITY_LAYOUTS["dp1-z1"], PARITY_LAYOUTS["dp2-z1"]
"""The layout that all are compared with, and the one whose distance from it gives the bounds in bf16."""
RESUMED = ("dp1-z1", "dp4-z2", "tp2-pp2", "tp2-dp2-z3", "pp2-dp2")
"""The layouts of `--layouts all` with `--resume`: every pair is saved and resumed."""


@dataclass(frozen=True)
class Runs:
    """The settings of all runs: number of steps (twice as many if `resumed`), optimizer and precision."""

    steps: int = 10
    optimizer: str = "adamw"
    precision: str = "fp32"
    resumed: bool = False

    @property
    def total_steps(self) -> int:
        """Steps of a run."""
        return 2 * self.steps if self.resumed else self.steps

    def changes(self) -> list[str]:
        """Return the overrides of a run, with as little logging and saving as possible."""
        demands = OPTIMIZERS[self.optimizer].demands
        settings = {
            "train.steps": self.total_steps,
            "train.log_every": self.total_steps,
            "checkpoint.every": self.steps,
            "data.workers": 0,
            "tracking.mirror": "false",
            "precision": self.precision,
            "optimizer.name": self.optimizer,
            **{demand.key: demand.value for demand in demands if demand.key.startswith("optimizer.")},
        }
        return [f"{key}={value}" for key, value in settings.items()]


@dataclass(frozen=True)
class Row:
    """One comparison: the curve of a run, the expected curve, and the duration of the run."""

    name: str
    processes: int
    seconds: float
    found: Curve
    expected: Curve

    def within(self, bounds: tuple[float, float]) -> bool:
        """Return whether the relative distances of loss (above its floor) and norm are within the bounds."""
        loss, norm = distance(self.found, self.expected)
        return loss <= bounds[0] and norm <= bounds[1]

    def line(self, bounds: tuple[float, float]) -> str:
        """Return the row of the table."""
        loss, norm = distance(self.found, self.expected, floor=0.0)
        verdict = "within" if self.within(bounds) else "NOT within"
        return f"| {self.name} | {self.processes} | {loss:.1e} | {norm:.1e} | {self.seconds:.0f} | {verdict} |"


class Parity:
    """The runs of one recipe under `folder`, each named after its layout; `overrides` are applied to the recipe."""

    def __init__(self, path: Path, overrides: Sequence[str], folder: Path, runs: Runs):
        self.path, self.overrides, self.folder, self.runs = path, overrides, folder, runs
        self.original = load_recipe(path, [*overrides])
        self._trained: dict[Path, tuple[Curve, float]] = {}

    def recipe(self, layout: ParityLayout, name: str) -> Recipe:
        """Return the recipe of run `name` under a layout, with its references relative to the new run directory.

        Raises UserError if the recipe cannot have the layout.
        """
        run_dir, original = self.folder / name, self.original

        def beside(reference: str) -> str:
            return os.path.relpath(original.run_dir / reference, run_dir)

        changes = [*self.overrides, *self.runs.changes(), f"run_dir={run_dir}", *layout.changes()]
        changes += [f"model.pretrained.{part}={beside(where)}" for part, where in original.model.pretrained.items()]
        references = {"init_from": original.init_from, "data.encoded": original.data.encoded}
        changes += [f"{key}={beside(reference)}" for key, reference in references.items() if reference is not None]
        recipe = _shared_by(load_recipe(self.path, changes), layout.data)
        check_tensor(preset_of(recipe), layout.tensor)
        return recipe

    def allowed(self, layouts: Iterable[ParityLayout]) -> list[ParityLayout]:
        """Return the layouts that the recipe can have; print the reason for each of the others."""
        allowed = []
        for layout in layouts:
            try:
                self.recipe(layout, layout.name)
                allowed.append(layout)
            except UserError as error:
                print(f"without {layout.name}: {' '.join(str(error).split())}", flush=True)
        return allowed

    def train(self, layout: ParityLayout, name: str | None = None) -> tuple[Curve, float]:
        """Train a run in new processes, unless it is trained already; return its curve and its duration in seconds."""
        recipe = self.recipe(layout, name or layout.name)

        def work() -> None:
            logging.disable(logging.INFO)  # with many runs, only warnings and errors are of interest
            torch.set_num_threads(threads(layout.processes))
            train(recipe)

        if recipe.run_dir not in self._trained:
            began = time.monotonic()
            try:
                run_ranks(work, layout.processes)
            except UserError as error:
                raise UserError(f"{recipe.run_dir.name}: {error}") from None
            self._trained[recipe.run_dir] = curve(recipe.run_dir), time.monotonic() - began
        return self._trained[recipe.run_dir]

    def bounds(self) -> tuple[float, float]:
        """Return the accepted relative distances of loss and norm from one process; in bf16 they are measured."""
        if self.runs.precision == "bf16":
            loss, norm = distance(self.train(REFERENCE_BF16)[0], self.train(SERIAL)[0], floor=0.0)
            return 2 * loss, 2 * norm
        return MUON if OPTIMIZERS[self.runs.optimizer].norm_of == "update" else (LOSS_RELATIVE, NORM_RELATIVE)

    def rows(self, layouts: Sequence[ParityLayout]) -> Iterator[Row]:
        """Yield the comparisons, one after another."""
        return self._resumed(layouts) if self.runs.resumed else self._layouts(layouts)

    def _layouts(self, layouts: Sequence[ParityLayout]) -> Iterator[Row]:
        """Compare each layout's run with that of one process."""
        serial, _ = self.train(SERIAL)
        for layout in dict.fromkeys([SERIAL, *layouts]):
            found, seconds = self.train(layout)
            yield Row(layout.name, layout.processes, seconds, found, serial)

    def _resumed(self, layouts: Sequence[ParityLayout]) -> Iterator[Row]:
        """Compare, for each pair, the second half of a run that was saved under one layout and resumed under another.

        The run is resumed from a copy of the first layout's run directory without its last checkpoint.
        """
        serial, _ = self.train(SERIAL)
        half, last = self.runs.steps, shutil.ignore_patterns(f"step-{self.runs.total_steps:08d}")
        for saved in layouts:
            self.train(saved)
            for layout in layouts:
                name = f"{saved.name}_to_{layout.name}"
                shutil.copytree(self.folder / saved.name, self.folder / name, ignore=last)
                found, seconds = self.train(layout, name)
                yield Row(name, layout.processes, seconds, found[half:], serial[half:])


def parity(path: Path, overrides: Sequence[str], names: str, runs: Runs, out: Path | None = None) -> bool:
    """Print the table of a recipe; return whether every row is within its bounds.

    `names` are names of layouts separated by commas, or `all`. The runs are written under `out`; without `out` beside
    the recipe's own, and removed if all are within the bounds. Raises UserError for an unknown layout, a named layout
    that the recipe cannot have, and a recipe that training refuses.
    """
    layouts = parse_layouts(names, RESUMED if runs.resumed else USUAL)
    folder, differs = _folder(out, load_recipe(path, [*overrides]).run_dir), False
    try:
        comparison = Parity(path, overrides, folder, runs)
        if names == "all":
            layouts = comparison.allowed(layouts)
        for layout in (SERIAL, *layouts):
            comparison.recipe(layout, layout.name)  # raises UserError before anything trains
        import_before_forks(mlflow=False)
        differs = not _table(comparison, layouts)
    finally:
        if out is None and not differs:
            shutil.rmtree(folder)
    if out is None and differs:
        print(f"the runs are in {folder}")
    return not differs


def parse_layouts(text: str, usual: Sequence[str]) -> list[ParityLayout]:
    """Return the layouts of a text. Raises UserError, with the nearest name, for an unknown layout."""
    names = list(usual) if text == "all" else text.split(",")
    for name in names:
        if name not in PARITY_LAYOUTS:
            near = [known for known in PARITY_LAYOUTS if known.startswith(name)]
            raise UserError(
                f"--layouts: found '{name}', expected names like tp2, tp2-pp2, tp2-dp2-z3 or dp4-z1 with up to {MOST}"
                " processes; the ZeRO stage is required with data parallelism and without a pipeline"
                f"{nearest(name, near or PARITY_LAYOUTS)}"
            )
    return [PARITY_LAYOUTS[name] for name in dict.fromkeys(names)]


def _shared_by(recipe: Recipe, ranks: int) -> Recipe:
    """Return the recipe with a micro-batch that is at most a data-parallel rank's share of a task block.

    A larger `parallel.micro_batch` would only be padded with samples of weight 0.
    """
    micro_batch = min(recipe.parallel.micro_batch, math.ceil(recipe.data.task_block / ranks))
    return recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"micro_batch": micro_batch})})


def _table(comparison: Parity, layouts: Sequence[ParityLayout]) -> bool:
    """Print each row as soon as it is known; return whether all are within the bounds."""
    original, runs, (loss, norm) = comparison.original, comparison.runs, comparison.bounds()
    own = "" if original.optimizer.name == runs.optimizer else f" (the recipe's is {original.optimizer.name})"
    halves = f", saved and resumed after {runs.steps}" if runs.resumed else ""
    measured = f": twice the distance of {REFERENCE_BF16.name}" if runs.precision == "bf16" else ""
    print(f"{original.stage}/{original.phase}, preset {original.model.preset}, global batch {original.global_batch}:")
    how = f"in {runs.precision} with {runs.optimizer}{own}"
    print(f"{runs.total_steps} steps{halves}, {how}, compared with {SERIAL.name};")
    print(f"at most {loss:.1e} in loss (beyond {LOSS_FLOOR:g}) and {norm:.1e} in gradient norm{measured}\n")
    print("| layout | processes | loss | gradient norm | seconds | |\n|---|---|---|---|---|---|", flush=True)
    within = True
    for row in comparison.rows(layouts):
        within = within and row.within((loss, norm))
        print(row.line((loss, norm)), flush=True)
    return within


def _folder(out: Path | None, run_dir: Path) -> Path:
    """Return the directory of the runs: `out`, which must be new or empty, or one beside the recipe's own run."""
    if out is None:
        make_directory(run_dir.parent, "run_dir")
        return Path(tempfile.mkdtemp(prefix=f"{run_dir.name}-parity-", dir=run_dir.parent))
    make_directory(out, "--out")
    if any(out.iterdir()):
        raise UserError(f"--out: found {out}, which is not empty; expected a new or empty directory")
    return out
