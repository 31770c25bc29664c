"""What a recipe names: the preset, and the pretrained parts that a phase starts from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from parallel.errors import UserError, nearest
from spar_scale.config.recipe import Recipe, behind_link, beside
from spar_scale.models.presets import PRESETS, Preset
from spar_scale.models.published import PretrainedPart, shapes_only
from spar_scale.phases import phase_of

_log = logging.getLogger(__name__)


def preset_of(recipe: Recipe) -> Preset:
    """Return the preset that `model.preset` names. Raises UserError for an unknown one."""
    name = recipe.model.preset
    if name not in PRESETS:
        raise UserError(f"model.preset: '{name}' is not one of {', '.join(sorted(PRESETS))}{nearest(name, PRESETS)}")
    return PRESETS[name]


def pretrained_parts(recipe: Recipe) -> dict[str, PretrainedPart]:
    """Return the parts that `model.pretrained` names, relative directories taken from the run directory.

    Raises UserError for a part that the phase does not take, a required part that is not given, and a
    directory without a config.
    """
    allowed, required = phase_of(recipe).pretrained_parts(recipe)
    given: Mapping[str, str] = recipe.model.pretrained or {}
    if unknown := sorted(set(given) - set(allowed)):
        raise UserError(
            f"model.pretrained.{unknown[0]}: stage '{recipe.stage}', phase '{recipe.phase}' takes"
            f" {', '.join(allowed) or 'none'}{nearest(unknown[0], allowed)}"
        )
    if missing := sorted(set(required) - set(given)):
        raise UserError(
            f"model.pretrained.{missing[0]}: stage '{recipe.stage}', phase '{recipe.phase}' starts from this part;"
            " name its directory, relative to run_dir"
        )
    return {part: pretrained_part(recipe, part) for part in given}


def pretrained_part(recipe: Recipe, name: str) -> PretrainedPart:
    """Return a part that `model.pretrained` names. Raises UserError where its directory holds no config."""
    run_dir, given = Path(recipe.run_dir), recipe.model.pretrained[name]
    part = PretrainedPart(name, beside(run_dir, given), recipe.model.preset)
    if not shapes_only() and not part.config_path.is_file():
        raise part.error(f"no config.json in {part.directory}{behind_link(run_dir, given)}")
    return part


def note_random_part(part: str, seed: int) -> None:
    """Log that a part was not given and is initialised from the seed instead."""
    _log.warning("model.pretrained.%s is not given: the part is initialised from seed %d and stays frozen", part, seed)
