"""A chain of phases, each of which starts from the results of earlier ones.

The recipes declare which phase starts from which (`init_from`, `model.pretrained`), so requesting one phase trains all
phases that it needs. Switches (dotted key -> value) are applied to the phases that read them. A run directory is named
after the switches that affect it, so two studies share their common runs, and a finished run is not trained again.
`steps` and `needed` return the phases as steps that can run at the same time (`processes.py`).
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

from parallel import checkpoint
from parallel.errors import UserError
from spar_scale.config.recipe import Recipe, load_recipe
from spar_scale.data.commands import make
from spar_scale.data.shapes_world import World
from spar_scale.phases import SIZES, named, parents_of, phase_names, phase_of, readers, shards_in
from spar_scale.runs.processes import Step
from spar_scale.training.encode import encode
from spar_scale.training.run_directory import refuse_another
from spar_scale.training.trainer import train

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SCENES_PER_S = 1500
START_S, ENCODING_S = 3.0, 80.0  # estimated durations: start of a phase until its first step; `data encode`
STORED = "encoded"
_PART, ENCODER_RATE = "model.pretrained.", "optimizer.groups.encoder"
Switches = Mapping[str, object]
NONE: Switches = {}
COMPARED: tuple[str, Switches] = ("tokenizer_encoder", {"model.encoder": "frozen"})
"""A variant of the tokenizer's last phase, which shows the benefit of training the vision tower."""


class Chain:
    """The phases of one size and seed, under `out`; shards are read from `out/data`.

    With `shared`, training stage 0 is under that directory and the same for all seeds. `overrides` (`a.b=c`) are
    applied to the recipes of later training stages. Raises UserError for a size without recipes.
    """

    def __init__(self, out: Path, size: str, seed: int, shared: Path | None = None, overrides: Sequence[str] = ()):
        self.folder = RECIPES / SIZES[size]
        if not (self.folder / "world.yaml").exists():
            available = [name for name, folder in SIZES.items() if (RECIPES / folder / "world.yaml").exists()]
            rule = "it needs a checkout of the project"
            if available:
                rule = f"there are recipes of size {', '.join(available)}"
            raise UserError(f"--size {size}: {self.folder} does not exist; {rule}")
        self.out, self.seed, self.shared = out, seed, shared or out
        self.phases = [phase for phase in phase_names() if (self.folder / f"{phase}.yaml").exists()]
        self.overrides = tuple(overrides)

    def is_trained(self, phase: str, switches: Switches = NONE) -> bool:
        """Return whether the run of a phase is finished. Raises UserError for a run of another recipe."""
        recipe = self.recipe(phase, switches)
        refuse_another(recipe.run_dir / "recipe.yaml", recipe)
        return _finished(recipe.run_dir, recipe.train.steps)

    def steps(self) -> list[Step]:
        """Return all phases as steps for `processes.run_steps`; they depend on a step `data`, which writes the shards.

        A step `encoded` stores the outputs of the frozen parts of the last phases, which take most of the time. The
        step `COMPARED` is a variant of a phase.
        """
        steps = [self._step(phase) for phase in self.phases]
        stored = [phase for phase in self.phases if named(phase).reads_stored_values_in_chain]
        first = self.phases.index(stored[0]) if stored else len(steps)
        encoding = [self._encoding(phase) for phase in stored[:1]]
        return [*steps[:first], *encoding, self._step(*COMPARED), *steps[first:]]

    def _encoding(self, phase: str) -> Step:
        recipe = self._with_stored_values(self.recipe(phase))
        # The weights of the parent are trained in this phase, so the stored values do not depend on them.
        frozen = self._unchanged(phase).model_copy(update={"init_from": None})
        after = ("data", *parents_of(frozen))
        return Step(STORED, self.out / STORED, functools.partial(encode, recipe), after, seconds=ENCODING_S)

    def _with_stored_values(self, recipe: Recipe) -> Recipe:
        data = recipe.data.model_copy(update={"encoded": os.path.relpath(self.out / STORED, recipe.run_dir)})
        return recipe.model_copy(update={"data": data})

    def needed(self, phase: str, switches: Switches = NONE) -> list[Step]:
        """Return the steps of a phase with switches, after those of all phases that it needs; without stored values."""
        before = {step.name: step for parent in self.parents(phase) for step in self.needed(parent, switches)}
        return [*before.values(), self._step(phase, switches, stored=False)]

    def _step(self, phase: str, switches: Switches = NONE, stored: bool = True) -> Step:
        recipe = self.recipe(phase, switches)
        after = ["data", *(self._name(parent, switches) for parent in self.parents(phase))]
        if stored and named(phase).reads_stored_values_in_chain:
            recipe = self._with_stored_values(recipe)
            after.append(STORED)
        return Step(
            self._name(phase, switches),
            recipe.run_dir,
            work=functools.partial(train, recipe),
            after=tuple(after),
            seconds=START_S + recipe.train.steps * recipe.global_batch / named(phase).samples_per_s,
            finished=functools.partial(self.is_trained, phase, switches),
        )

    def _name(self, phase: str, switches: Switches) -> str:
        return str(self.run_dir(phase, switches).relative_to(self.shared))

    def run_dir(self, phase: str, switches: Switches = NONE) -> Path:
        """Return the run directory of a phase with switches."""
        effective = sorted(self._effective(phase, switches))
        marks = [f"{key.rpartition('.')[2]}={str(value).strip('./').replace('/', '+')}" for key, value in effective]
        root = self.shared if named(phase).is_stand_in else self.out
        return root / ",".join([phase, *marks])

    def parents(self, phase: str) -> list[str]:
        """Return the phases that a phase starts from."""
        return parents_of(self._unchanged(phase))

    def recipe(self, phase: str, switches: Switches = NONE) -> Recipe:
        """Return the recipe of a phase with switches, with the chain's run directory, shards and parents."""
        original, run_dir = self._unchanged(phase), self.run_dir(phase, switches)

        def beside(reference: str) -> str:
            parent, *inside = PurePath(reference).parts[1:]
            return os.path.join(os.path.relpath(self.run_dir(parent, switches), run_dir), *inside)

        changes = [] if named(phase).is_stand_in else [*self.overrides]
        changes += [f"{_PART}{part}={beside(where)}" for part, where in original.model.pretrained.items()]
        for key, value in sorted(_read_by(original, switches)):
            text = beside(str(value)) if key.startswith(_PART) else json.dumps(value)
            changes.append(f"{key}={text}")
        changes.append(f"run_dir={run_dir}")
        if self.shared == self.out or not named(phase).is_stand_in:
            changes.append(f"seed={self.seed}")
        if original.init_from:
            changes.append(f"init_from={beside(original.init_from)}")
        changes += shards_in(original, self.shared / "data")
        return load_recipe(self.folder / f"{phase}.yaml", changes)

    def _unchanged(self, phase: str) -> Recipe:
        return _load(self.folder / f"{phase}.yaml")

    def _effective(self, phase: str, switches: Switches) -> set[tuple[str, object]]:
        """Return the switches that this phase or one of its ancestors reads."""
        inherited = (self._effective(parent, switches) for parent in self.parents(phase))
        return _read_by(self._unchanged(phase), switches).union(*inherited)


def data_step(world: World, out: Path) -> Step:
    """Return the step `data`, which writes a world's shards to `out/data`."""
    samples = world.scenes + world.heldout + world.edits
    return Step("data", out / "data", functools.partial(make, world, out / "data"), seconds=1 + samples / SCENES_PER_S)


@functools.cache
def _load(path: Path) -> Recipe:
    return load_recipe(path)


def _read_by(recipe: Recipe, switches: Switches) -> set[tuple[str, object]]:
    """The switches that the phase of a recipe reads; a phase that stands in for published weights has none."""
    phase, optional = phase_of(recipe), readers()
    if phase.is_stand_in:
        return set()

    def is_read(key: str) -> bool:
        if key.startswith(_PART):
            return key.removeprefix(_PART) in (*phase.requires, *phase.accepts, *phase.requires_when)
        key = "model.encoder" if key == ENCODER_RATE else key  # a declaration does not name learning-rate groups
        return key not in optional or key in phase.optional_keys

    return {(key, value) for key, value in switches.items() if is_read(key)}


def _finished(run_dir: Path, steps: int) -> bool:
    """Return whether a run has its last checkpoint and its published model, which is written after the checkpoint."""
    root = run_dir / "checkpoints"
    latest = checkpoint.find(root) if root.is_dir() else None
    publishes = named(run_dir.name.partition(",")[0]).publishes is not None
    return (
        latest is not None
        and latest.name == f"step-{steps:08d}"
        and (not publishes or (run_dir / "pretrained").is_dir())
    )
