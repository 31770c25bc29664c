"""The phases of training. One module declares one phase and builds it; every list of phases derives from these.

A module `spar_scale/phases/NAME.py` holds the declaration `PHASE = Phase(name="NAME", ...)` and the function
`build(recipe) -> Stage`. The recipes of the phase are called NAME.yaml. Nothing else has to change for a new phase
that reads keys which the schema has.

All commands import these modules to check a recipe or to print a help text. So a declaration imports no model
library: `build` imports what it needs when it is called.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal

from parallel.errors import UserError, nearest

if TYPE_CHECKING:
    from spar_scale.config.recipe import Recipe
    from spar_scale.stages import Stage

Command = Literal["generate", "edit", "routes", "ask", "reconstruct", "export"]
Role = Literal["mllm", "reconstruction", "tokenizer", "final"]
SIZES = {"demo": "tiny", "smoke": "smoke", "full": "full"}
"""Size of the miniature -> its folder of recipes."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """The declaration of one phase. A recipe selects it by its keys `stage` (`training_stage`) and `phase`."""

    name: str
    """Name of the module, of the recipes and of the run directories of a chain."""
    training_stage: str
    """The part of SPAR that trains. A training stage has one phase or several."""
    stage_number: int
    """Position of the training stage: 0 is the stage that stands in for published weights."""
    phase: str
    """Name within the training stage."""
    trains: str
    """What trains, for the report and the README."""
    losses: str
    """The terms of the loss, for the README."""
    reads: tuple[str, ...] = ()
    """Recipe keys that this phase reads and not every other phase does.

    A recipe that sets a key for a phase that does not read it is refused. `init_from` and `data.encoded` are not
    listed here: they follow from `starts_from` and `reads_stored_values`.
    """
    requires: tuple[str, ...] = ()
    """Pretrained parts (`model.pretrained`) that must be given."""
    accepts: tuple[str, ...] = ()
    """Pretrained parts that may be given besides."""
    requires_when: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Pretrained part -> (recipe key, values) for which it must be given. For other values it is refused."""
    vision_only: tuple[str, ...] = ()
    """Pretrained parts in the layout of an MLLM of which only the vision tower and the projector are read."""
    starts_from: tuple[str, ...] = ()
    """Names of the phases whose trained weights this one continues from (`init_from`)."""
    publishes: str | None = None
    """The pretrained part that a finished run writes to `pretrained/`, under the name that later phases use."""
    used_by: frozenset[Command] = frozenset()
    """Commands that accept a run of this phase."""
    evaluated_as: Role | None = None
    """The role of its run in `spar-scale evaluate`.

    `reconstruction`: only reconstructions are scored. `mllm`, `tokenizer` and `final` are the runs whose language
    model, tokenizer and whole model are scored: of several phases with one of these roles, the last one counts.
    """
    slurm_script: str
    """The script in `cluster/` that trains it."""
    samples_per_s: float
    """Throughput of the tiny preset on one core, roughly. The first estimate of the time left uses it."""
    reads_stored_values: bool = False
    """Whether it can read the outputs of its frozen parts from disk (`data.encoded`)."""
    reads_stored_values_in_chain: bool = False
    """Whether the chain of the miniature stores them. The first such phase writes what all of them read."""

    @property
    def key(self) -> str:
        """Training stage and phase, as in `tokenizer/init`."""
        return f"{self.training_stage}/{self.phase}"

    @property
    def is_stand_in(self) -> bool:
        """Whether it trains what SPAR takes as published weights. A study trains it once for all seeds and switches."""
        return self.stage_number == 0

    @property
    def optional_keys(self) -> frozenset[str]:
        """All recipe keys that this phase reads and not every other phase does."""
        derived = {"init_from": bool(self.starts_from), "data.encoded": self.reads_stored_values}
        return frozenset(self.reads) | {key for key, is_read in derived.items() if is_read}

    def pretrained_parts(self, recipe: Recipe) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the pretrained parts that a recipe of this phase (may name, must name)."""
        needed = tuple(part for part, (key, *values) in self.requires_when.items() if _value(recipe, key) in values)
        required = (*self.requires, *needed)
        return (*required, *self.accepts), required

    def build(self, recipe: Recipe) -> Stage:
        """Build the phase. `spar_scale.stages.build` calls this; it freezes what does not train."""
        return importlib.import_module(f"{__name__}.{self.name}").build(recipe)


def declared() -> tuple[Phase, ...]:
    """Return all phases, in an order in which they can be trained."""
    return _declared(tuple(__path__))


def phase_names() -> tuple[str, ...]:
    """Return the names of all phases, in their order."""
    return tuple(phase.name for phase in declared())


def named(name: str) -> Phase:
    """Return the phase with a name. Raises UserError for an unknown one."""
    for phase in declared():
        if phase.name == name:
            return phase
    raise UserError(f"phase: '{name}' is not one of {', '.join(phase_names())}{nearest(name, phase_names())}")


def find(training_stage: str, phase: str) -> Phase | None:
    """Return the phase that a recipe's keys `stage` and `phase` select, None if there is none."""
    same = (one for one in declared() if (one.training_stage, one.phase) == (training_stage, phase))
    return next(same, None)


def phase_of(recipe: Recipe) -> Phase:
    """Return the phase of a recipe. Raises UserError for an unknown training stage or phase."""
    found = find(recipe.stage, recipe.phase)
    if found is not None:
        return found
    stages = phases_by_stage()
    if recipe.stage not in stages:
        raise UserError(f"stage: '{recipe.stage}' is not one of {', '.join(stages)}{nearest(recipe.stage, stages)}")
    known = stages[recipe.stage]
    raise UserError(
        f"phase: '{recipe.phase}' is not a phase of stage '{recipe.stage}', which has"
        f" {', '.join(known)}{nearest(recipe.phase, known)}"
    )


def phases_by_stage() -> dict[str, tuple[str, ...]]:
    """Return training stage -> its phases, both in their order."""
    found: dict[str, tuple[str, ...]] = {}
    for one in declared():
        found[one.training_stage] = (*found.get(one.training_stage, ()), one.phase)
    return found


def readers() -> dict[str, tuple[str, ...]]:
    """Return recipe key -> who reads it, for keys that some phases do not read.

    A reader is a training stage if all of its phases read the key, else a phase (`tokenizer/init`).
    """
    stages = phases_by_stage()
    found: dict[str, tuple[str, ...]] = {}
    for key in dict.fromkeys(key for one in declared() for key in sorted(one.optional_keys)):
        of_key = [one for one in declared() if key in one.optional_keys]
        phases = {stage: [one.key for one in of_key if one.training_stage == stage] for stage in stages}
        found[key] = tuple(
            reader
            for stage, some in phases.items()
            for reader in ([stage] if len(some) == len(stages[stage]) else some)
        )
    return found


def accepted_by(command: Command) -> tuple[Phase, ...]:
    """Return the phases whose runs a command accepts."""
    return tuple(phase for phase in declared() if command in phase.used_by)


def with_role(role: Role) -> tuple[Phase, ...]:
    """Return the phases that have a role in the evaluation."""
    return tuple(phase for phase in declared() if phase.evaluated_as == role)


def either(words: Sequence[str]) -> str:
    """Return `a`, `a or b`, or `a, b or c`."""
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def table() -> str:
    """Return the table of phases in the README (Markdown)."""
    head = ("training stage", "phase", "trains", "starts from (in brackets: optional)", "publishes", "losses")
    rows = [head, ("---",) * len(head)]
    for one in declared():
        parts = (*one.requires, *(f"({part})" for part in (*one.accepts, *one.requires_when)))
        origin = ", ".join((*one.starts_from, *parts)) or "the seed"
        stage = f"{one.stage_number} {one.training_stage}{' (miniature only)' if one.is_stand_in else ''}"
        rows.append((stage, one.phase, one.trains, origin, one.publishes or "", one.losses))
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows)


def origin_of(reference: str) -> str:
    """Return the run that a reference beside a run directory leads to: `a` of `../a/pretrained`."""
    return next(iter(PurePath(reference).parts[1:2]), "")


def parents_of(recipe: Recipe) -> list[str]:
    """Return the phases that a recipe starts from: the first part of each path beside its own run directory."""
    references = [*([recipe.init_from] if recipe.init_from else []), *recipe.model.pretrained.values()]
    return list(dict.fromkeys(origin_of(reference) for reference in references))


def shards_in(recipe: Recipe, folder: Path) -> list[str]:
    """Return the overrides with which a recipe of the miniature reads its shards from a folder."""
    return [
        f"data.sources.{index}.shards={folder / PurePath(str(source.shards)).name}"
        for index, source in enumerate(recipe.data.sources)
    ]


@functools.cache
def _declared(path: tuple[str, ...]) -> tuple[Phase, ...]:
    """The phases in the folders of `path`. It is the argument so that a folder may be added to `__path__` later."""
    found: dict[str, Phase] = {}
    for module in pkgutil.iter_modules(path):
        phase = getattr(importlib.import_module(f"{__name__}.{module.name}"), "PHASE", None)
        if not isinstance(phase, Phase) or phase.name != module.name:
            expected = f"PHASE = Phase(name='{module.name}', ...)"
            raise TypeError(f"{__name__}.{module.name}: found PHASE = {phase!r}, expected {expected}")
        if same := [one.name for one in found.values() if one.key == phase.key]:
            raise ValueError(f"{__name__}.{module.name}: {phase.key} is already declared by {same[0]}")
        found[phase.name] = phase
    return tuple(sorted(found.values(), key=lambda phase: (phase.stage_number, _depth(phase, found), phase.name)))


def _depth(phase: Phase, known: Mapping[str, Phase]) -> int:
    """The number of phases that must be trained one after another before this one."""
    parts = {*phase.requires, *phase.accepts}
    publishers = [one for one in known.values() if one.publishes in parts]
    before = [*(known[name] for name in phase.starts_from if name in known), *publishers]
    return 1 + max((_depth(one, known) for one in before), default=-1)


def _value(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part)
    return value
