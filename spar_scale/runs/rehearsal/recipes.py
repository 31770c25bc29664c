"""The recipes of a rehearsal: those of a folder, with few steps, small batches and a thin preset.

All else (optimizer, losses, sources, what a phase starts from, EMA, discriminator) is as written. Every change is a
dotted key with its old and its new value, so that it can be shown.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.errors import UserError
from spar_scale.config.recipe import Recipe, beside, load_folder, load_recipe
from spar_scale.data.order import Order, SourceShape
from spar_scale.models.presets import PRESETS, REHEARSED, Preset
from spar_scale.phases import named, origin_of, parents_of, phase_of
from spar_scale.runs.parity import PARITY_LAYOUTS, ParityLayout
from spar_scale.runs.rehearsal.photographs import COUNT

WITHOUT_LANGUAGE, WITH_LANGUAGE = PARITY_LAYOUTS["dp2-z2"], PARITY_LAYOUTS["pp2"]
"""Layouts at which phases are resumed. In a pipeline two processes hold the vocabulary's matrices once."""
STEPS, SAVED = 3, 2
"""Steps of a phase, and the step that is saved and resumed; the steps after it are trained twice and compared."""
BATCH = 2


@dataclass(frozen=True)
class Rehearsed:
    """One phase of a rehearsal: its recipe, its preset, and what differs from the recipe as written."""

    name: str
    recipe: Recipe
    preset: Preset
    resumed_at: ParityLayout
    """The layout after the kill."""
    changes: Mapping[str, tuple[Any, Any]]
    """Dotted key -> (as written, here)."""
    written_parts: Mapping[str, Path]
    """Published part -> the directory that it is read from, under the directory of the rehearsal."""

    def tasks(self) -> dict[str, int]:
        """Return task -> the samples of it in all steps together; {} for a phase without text, which has one task."""
        if self.resumed_at is WITHOUT_LANGUAGE:
            return {}
        sources, blocks = self.recipe.data.sources, self.recipe.global_batch // self.recipe.data.task_block
        order = Order(
            self.recipe.seed,
            [SourceShape(source.name, source.weight, (COUNT,)) for source in sources],
            self.recipe.global_batch,
            self.recipe.data.task_block,
        )
        counts = dict.fromkeys((source.task or source.name for source in sources), 0)
        for block in range(STEPS * blocks):
            source = sources[order.source(block)]
            counts[source.task or source.name] += self.recipe.data.task_block
        return counts

    def reduced(self) -> str:
        """Return what of the model's own settings does not fit the thin preset, and what takes its place; else ""."""
        old, new = self.changes.get("objective.align_block", (None, None))
        return "" if new is None else f", align_block {new} (recipe: {old})"

    def told(self) -> str:
        """Return the changes as one line each."""
        return "\n".join(f"  {key}: {_short(old)} -> {_short(new)}" for key, (old, new) in self.changes.items())


def rehearsed_phases(folder: Path, out: Path, form: str, wanted: list[str]) -> list[Rehearsed]:
    """Return the phases of a folder in their order, or those of `wanted` with all that they start from.

    `form` is a key of REHEARSED. Raises UserError for a folder without recipes, a phase that it does not have, and a
    preset that has no such form.
    """
    recipes = load_folder(folder)
    for phase in wanted:
        if named(phase).name not in recipes:
            raise UserError(f"--phases: {folder} holds no {phase}.yaml; it has {', '.join(recipes)}")
    needed = set(wanted or recipes)
    for phase in reversed(recipes):
        if phase in needed:
            needed.update(parent for parent in parents_of(recipes[phase]) if parent in recipes)
    return [
        _rehearsed(folder / f"{phase}.yaml", recipes[phase], out, form, set(recipes))
        for phase in recipes
        if phase in needed
    ]


def save_recipes(phases: Sequence[Rehearsed], folder: Path) -> None:
    """Write the changed recipes, so that each can be trained, and the folder submitted, by itself."""
    folder.mkdir(parents=True, exist_ok=True)
    for phase in phases:
        phase.recipe.save(folder / f"{phase.name}.yaml")


def _rehearsed(path: Path, original: Recipe, out: Path, form: str, trained: set[str]) -> Rehearsed:
    sizes = REHEARSED[form]
    if original.model.preset not in sizes:
        raise UserError(
            f"{path}: model.preset is '{original.model.preset}'; a rehearsal is of {' or '.join(sizes)}. The recipes of"
            " the miniature are rehearsed by `spar-scale demo --size smoke`"
        )
    name, preset = phase_of(original).name, PRESETS[sizes[original.model.preset]]
    layout = WITH_LANGUAGE if "mllm" in phase_of(original).requires else WITHOUT_LANGUAGE
    run_dir, values = out / name, original.model_dump(mode="json")
    changed: dict[str, Any] = {"run_dir": str(run_dir), "model.preset": preset.name}
    written = {}
    for part, reference in original.model.pretrained.items():
        if origin_of(reference) in trained:
            continue
        directory = beside(run_dir, reference)
        if not directory.is_relative_to(out.resolve()):  # random weights never replace what a user has
            changed[f"model.pretrained.{part}"] = f"../pretrained/{part}"
            directory = beside(run_dir, f"../pretrained/{part}")
        written[part] = directory
    changed |= dict(_settings(original, preset, out, layout))
    differing = {key: value for key, value in changed.items() if _at(values, key) != value}
    recipe = load_recipe(path, [f"{key}={_yaml(value)}" for key, value in differing.items()])
    shown = {key: (_at(values, key), value) for key, value in differing.items() if key != "run_dir"}
    return Rehearsed(name, recipe, preset, layout, shown, written)


def _settings(original: Recipe, preset: Preset, out: Path, layout: ParityLayout) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value in the rehearsal); a value that is as written is no change."""
    block = layout.data  # so that its ranks share a block, and a pipeline's batch has blocks of several tasks
    yield from {
        "precision": "fp32",
        "attention": "auto",
        "global_batch": min(BATCH, original.global_batch),
        "train.steps": STEPS,
        "train.log_every": 1,
        "optimizer.warmup_steps": min(1, original.optimizer.warmup_steps),
        "data.task_block": block,
        "data.workers": min(1, original.data.workers),
        "data.encoded": None,
        "checkpoint.every": SAVED,
        "tracking.mirror": False,
        "parallel.tensor": 1,
        "parallel.pipeline": 1,
        "parallel.micro_batch": block,
    }.items()
    if original.model.image_size is not None:  # the same share of the preset's, where there are such pictures
        share = original.model.image_size / PRESETS[original.model.preset].image_size
        yield "model.image_size", max(round(share * preset.image_size), preset.smallest_size)
    for index, source in enumerate(original.data.sources):
        kind = "edits" if (source.task or source.name) == "editing" else "pairs"
        yield f"data.sources.{index}.shards", str(out / "data" / f"{kind}-*.tar")
        yield f"data.sources.{index}.text", None
    if original.objective.adversarial_start >= SAVED and original.objective.adversarial_weight > 0:
        yield "objective.adversarial_start", SAVED - 1  # so that its state is in the checkpoint that is resumed
    if "objective.align_block" in phase_of(original).reads:
        yield "objective.align_block", min(original.objective.align_block, preset.diffusion.layers)


def _at(values: Any, key: str) -> Any:
    """Return the value of a dotted key, in which a number is a place in a list; None where there is none."""
    for part in key.split("."):
        values = values[int(part)] if isinstance(values, list) else values.get(part)
    return values


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _short(value: Any) -> str:
    return "-" if value is None else str(value)
