"""Whether a recipe keeps the promise on this machine: the same run under every layout, and saved under one, resumed
under another.

Each layout trains the recipe for a few steps in a world of forked processes of its own, through the one trainer,
and its curve is compared with that of one process. What is measured is the arithmetic of a layout and nothing else, so
every run is in fp32 with AdamW, whatever the recipe says. Two bands that are wider can be asked for: Muon, whose
Newton-Schulz iteration runs in half precision on a GPU, and bf16, whose bounds are twice the measured distance between
one process and two. The trade-off: all processes share this machine, so a large recipe is made small by overrides.
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
"""Processes of the largest layout."""
MUON = (10 * LOSS_RELATIVE, 10 * NORM_RELATIVE)
"""Bounds for runs with Muon: room for an entry of an update that rounds the other way in half precision."""


@dataclass(frozen=True)
class ParityLayout:
    """A layout with the number of its data ranks."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    zero: int = 1

    @property
    def processes(self) -> int:
        """Ranks of the world."""
        return self.tensor * self.pipeline * self.data

    @property
    def name(self) -> str:
        """Its spelling: sizes above 1, and the ZeRO stage where there is more than one to choose from."""
        sizes = {"tp": self.tensor, "pp": self.pipeline, "dp": self.data}
        parts = [f"{axis}{size}" for axis, size in sizes.items() if size > 1] or ["dp1"]
        return "-".join([*parts, *([f"z{self.zero}"] if len(self.stages) > 1 else [])])

    @property
    def stages(self) -> tuple[int, ...]:
        """The ZeRO stages that its sizes go with: a pipeline with the first, and so tensor ranks alone."""
        return (1, 2, 3) if self.pipeline == 1 and (self.data > 1 or self.tensor == 1) else (1,)

    def changes(self) -> list[str]:
        """The overrides that give a recipe this layout."""
        sizes = {"tensor": self.tensor, "pipeline": self.pipeline, "zero": self.zero}
        return [f"parallel.{key}={value}" for key, value in sizes.items()]


def _spreads() -> Iterator[ParityLayout]:
    sizes = range(1, MOST + 1)
    for processes in sizes:
        for tensor in sizes:
            for pipeline in sizes:
                data, rest = divmod(processes, tensor * pipeline)
                if rest == 0 and data > 0:
                    stages = ParityLayout(tensor, pipeline, data).stages
                    yield from (ParityLayout(tensor, pipeline, data, zero) for zero in stages)


PARITY_LAYOUTS = {spread.name: spread for spread in _spreads()}
"""Every layout of up to MOST processes by its spelling."""
USUAL = [name for name, spread in PARITY_LAYOUTS.items() if spread.processes in (1, 2, 4)]
"""What `all` stands for."""
SERIAL, BESIDE = PARITY_LAYOUTS["dp1-z1"], PARITY_LAYOUTS["dp2-z1"]
"""What all are compared with, and whose distance from it is the measure in bf16."""
RESUMED = ("dp1-z1", "dp4-z2", "tp2-pp2", "tp2-dp2-z3", "pp2-dp2")
"""The layouts of which every pair is saved and resumed."""


@dataclass(frozen=True)
class Runs:
    """What is trained: for how many steps (twice, where saved and resumed between them), by which optimizer, how."""

    steps: int = 10
    optimizer: str = "adamw"
    precision: str = "fp32"
    resumed: bool = False

    @property
    def whole(self) -> int:
        """Steps of a run."""
        return 2 * self.steps if self.resumed else self.steps

    def changes(self) -> list[str]:
        """The overrides that make a run of a recipe: quiet, and saved no more often than needed."""
        demands = OPTIMIZERS[self.optimizer].demands
        settings = {
            "train.steps": self.whole,
            "train.log_every": self.whole,
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
    """One comparison: a run's curve and the one expected, and the seconds that the run took."""

    name: str
    processes: int
    seconds: float
    found: Curve
    expected: Curve

    def within(self, bounds: tuple[float, float]) -> bool:
        """Whether loss and norm are no farther than `bounds` say, relatively; the loss above its floor."""
        loss, norm = distance(self.found, self.expected)
        return loss <= bounds[0] and norm <= bounds[1]

    def line(self, bounds: tuple[float, float]) -> str:
        """The row of the table."""
        loss, norm = distance(self.found, self.expected, floor=0.0)
        verdict = "within" if self.within(bounds) else "NOT within"
        return f"| {self.name} | {self.processes} | {loss:.1e} | {norm:.1e} | {self.seconds:.0f} | {verdict} |"


class Parity:
    """The runs of one recipe under `folder`, each named after its layout; `overrides` are laid over its file."""

    def __init__(self, path: Path, overrides: Sequence[str], folder: Path, runs: Runs):
        self.path, self.overrides, self.folder, self.runs = path, overrides, folder, runs
        self.plain = load_recipe(path, [*overrides])
        self._trained: dict[Path, tuple[Curve, float]] = {}

    def recipe(self, spread: ParityLayout, name: str) -> Recipe:
        """The recipe of run `name` under a layout, what it starts from in its place; UserError where it cannot be."""
        run_dir, plain = self.folder / name, self.plain

        def beside(reference: str) -> str:
            return os.path.relpath(plain.run_dir / reference, run_dir)

        changes = [*self.overrides, *self.runs.changes(), f"run_dir={run_dir}", *spread.changes()]
        changes += [f"model.pretrained.{part}={beside(where)}" for part, where in plain.model.pretrained.items()]
        references = {"init_from": plain.init_from, "data.encoded": plain.data.encoded}
        changes += [f"{key}={beside(reference)}" for key, reference in references.items() if reference is not None]
        recipe = _shared_by(load_recipe(self.path, changes), spread.data)
        check_tensor(preset_of(recipe), spread.tensor)
        return recipe

    def allowed(self, spreads: Iterable[ParityLayout]) -> list[ParityLayout]:
        """Those that the recipe can have; of the others it is said why not."""
        found = []
        for spread in spreads:
            try:
                self.recipe(spread, spread.name)
                found.append(spread)
            except UserError as error:
                print(f"without {spread.name}: {' '.join(str(error).split())}", flush=True)
        return found

    def train(self, spread: ParityLayout, name: str | None = None) -> tuple[Curve, float]:
        """Train a run in a world of its own, unless it was; return its curve and the seconds it took."""
        recipe = self.recipe(spread, name or spread.name)

        def work() -> None:
            logging.disable(logging.INFO)  # of so many runs only what is wrong
            torch.set_num_threads(threads(spread.processes))
            train(recipe)

        if recipe.run_dir not in self._trained:
            began = time.monotonic()
            try:
                run_ranks(work, spread.processes)
            except UserError as error:
                raise UserError(f"{recipe.run_dir.name}: {error}") from None
            self._trained[recipe.run_dir] = curve(recipe.run_dir), time.monotonic() - began
        return self._trained[recipe.run_dir]

    def bounds(self) -> tuple[float, float]:
        """How far loss and norm may lie from those of one process; in bf16 it is measured."""
        if self.runs.precision == "bf16":
            loss, norm = distance(self.train(BESIDE)[0], self.train(SERIAL)[0], floor=0.0)
            return 2 * loss, 2 * norm
        return MUON if OPTIMIZERS[self.runs.optimizer].norm_of == "update" else (LOSS_RELATIVE, NORM_RELATIVE)

    def rows(self, spreads: Sequence[ParityLayout]) -> Iterator[Row]:
        """The comparisons, one after another."""
        return self._resumed(spreads) if self.runs.resumed else self._layouts(spreads)

    def _layouts(self, spreads: Sequence[ParityLayout]) -> Iterator[Row]:
        """Each layout's run against that of one process."""
        serial, _ = self.train(SERIAL)
        for spread in dict.fromkeys([SERIAL, *spreads]):
            found, seconds = self.train(spread)
            yield Row(spread.name, spread.processes, seconds, found, serial)

    def _resumed(self, spreads: Sequence[ParityLayout]) -> Iterator[Row]:
        """Each pair: the second half of a run that was saved under one layout and resumed under another.

        The half before is that of the layout's own run, whose last checkpoint is left out of what is resumed.
        """
        serial, _ = self.train(SERIAL)
        half, last = self.runs.steps, shutil.ignore_patterns(f"step-{self.runs.whole:08d}")
        for saved in spreads:
            self.train(saved)
            for spread in spreads:
                name = f"{saved.name}_to_{spread.name}"
                shutil.copytree(self.folder / saved.name, self.folder / name, ignore=last)
                found, seconds = self.train(spread, name)
                yield Row(name, spread.processes, seconds, found[half:], serial[half:])


def parity(path: Path, overrides: Sequence[str], layouts: str, runs: Runs, out: Path | None = None) -> bool:
    """Print the table of a recipe; return whether every row is within its bounds.

    `layouts` are spellings between commas, or `all`. The runs go under `out`, or beside the recipe's own, where they
    stay only if they differ. Raises UserError for an unknown layout, one asked for by name that the recipe cannot
    have, and what training refuses.
    """
    spreads = parse_layouts(layouts, RESUMED if runs.resumed else USUAL)
    folder, differs = _folder(out, load_recipe(path, [*overrides]).run_dir), False
    try:
        found = Parity(path, overrides, folder, runs)
        if layouts == "all":
            spreads = found.allowed(spreads)
        for spread in (SERIAL, *spreads):
            found.recipe(spread, spread.name)  # is refused before anything trains
        import_before_forks(mlflow=False)
        differs = not _table(found, spreads)
    finally:
        if out is None and not differs:
            shutil.rmtree(folder)
    if out is None and differs:
        print(f"the runs are in {folder}")
    return not differs


def parse_layouts(text: str, usual: Sequence[str]) -> list[ParityLayout]:
    """The layouts that a text names; UserError, with the nearest spelling, for what is none."""
    names = list(usual) if text == "all" else text.split(",")
    for name in names:
        if name not in PARITY_LAYOUTS:
            near = [known for known in PARITY_LAYOUTS if known.startswith(name)]
            raise UserError(
                f"--layouts: found '{name}'; a layout of up to {MOST} processes is spelled like tp2, tp2-pp2,"
                " tp2-dp2-z3 or dp4-z1, with its ZeRO stage where data ranks are and no pipeline is"
                f"{nearest(name, near or PARITY_LAYOUTS)}"
            )
    return [PARITY_LAYOUTS[name] for name in dict.fromkeys(names)]


def _shared_by(recipe: Recipe, ranks: int) -> Recipe:
    """The recipe for so many data-parallel ranks: a block of one task is no more samples than they take at once.

    A larger `parallel.micro_batch` would be filled up with samples of weight 0; it changes nothing of what is computed.
    """
    micro_batch = min(recipe.parallel.micro_batch, math.ceil(recipe.data.task_block / ranks))
    return recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"micro_batch": micro_batch})})


def _table(found: Parity, spreads: Sequence[ParityLayout]) -> bool:
    """Print the rows as they come; return whether all are within the bounds."""
    plain, runs, (loss, norm) = found.plain, found.runs, found.bounds()
    own = "" if plain.optimizer.name == runs.optimizer else f" (the recipe's is {plain.optimizer.name})"
    halves = f", saved and resumed after {runs.steps}" if runs.resumed else ""
    measured = f": twice the distance of {BESIDE.name}" if runs.precision == "bf16" else ""
    print(f"{plain.stage}/{plain.phase}, preset {plain.model.preset}, global batch {plain.global_batch}:")
    print(f"{runs.whole} steps{halves}, in {runs.precision} with {runs.optimizer}{own}, compared with {SERIAL.name};")
    print(f"at most {loss:.1e} in loss (beyond {LOSS_FLOOR:g}) and {norm:.1e} in gradient norm{measured}\n")
    print("| layout | processes | loss | gradient norm | seconds | |\n|---|---|---|---|---|---|", flush=True)
    within = True
    for row in found.rows(spreads):
        within = within and row.within((loss, norm))
        print(row.line((loss, norm)), flush=True)
    return within


def _folder(out: Path | None, run_dir: Path) -> Path:
    """Where the runs go: into `out`, which is new or empty, or beside the recipe's own."""
    if out is None:
        make_directory(run_dir.parent, "run_dir")
        return Path(tempfile.mkdtemp(prefix=f"{run_dir.name}-parity-", dir=run_dir.parent))
    make_directory(out, "--out")
    if any(out.iterdir()):
        raise UserError(f"--out: found {out}, which holds something already; must be a new or empty directory")
    return out
