"""Which runs can be used for what, and loading one for use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from parallel.errors import UserError
from spar_scale.config.recipe import Recipe
from spar_scale.models.presets import Preset
from spar_scale.phases import Command, accepted_by, either, phase_of
from spar_scale.stages.parts import preset_of
from spar_scale.training.export import recipe_of, trained_model

LACKS: dict[Command, str] = {
    "generate": "draws no pictures",
    "edit": "edits no pictures",
    "routes": "routes no tokens",
    "ask": "answers no questions",
    "reconstruct": "reconstructs no pictures",
}
"""Command -> what a run that it refuses does not do. The declarations of the phases say which runs it accepts."""


@dataclass(frozen=True)
class TrainedRun:
    """A run's averaged model in eval mode; as a string, what it is."""

    preset: Preset
    model: nn.Module
    checkpoint: Path

    def __str__(self) -> str:
        scale = getattr(self.model, "latent_scale", None)
        said = f"the average of {self.checkpoint}, preset '{self.preset.name}'"
        return said if scale is None else f"{said}, latent scale {scale:.4g}"


def fit_recipe(run_dir: Path, use: Command) -> Recipe:
    """Return the recipe of a run that a command accepts; any other is refused with the phases that are accepted."""
    recipe = recipe_of(run_dir)
    if use not in phase_of(recipe).used_by:
        stages: dict[str, list[str]] = {}
        for phase in accepted_by(use):
            stages.setdefault(phase.training_stage, []).append(f"'{phase.phase}'")
        named = [f"stage '{stage}', phase {either(listed)}" for stage, listed in stages.items()]
        raise UserError(
            f"{run_dir}: a run of stage '{recipe.stage}', phase '{recipe.phase}', which {LACKS[use]};"
            f" a run of {', or '.join(named)} is needed"
        )
    return recipe


def load_run(run_dir: Path, use: Command) -> TrainedRun:
    """Load a run that is fit for a use."""
    preset = preset_of(fit_recipe(run_dir, use))
    return TrainedRun(preset, *trained_model(run_dir))
