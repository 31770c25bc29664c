"""Which runs can be used for what, and loading one for use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from parallel.errors import UserError
from spar_scale.models.presets import Preset
from spar_scale.recipe import Recipe
from spar_scale.stages.parts import preset_of
from spar_scale.training.export import recipe_of, trained_model

_CONNECTOR, _JOINT = ("align", "connector"), (("align", "joint"), ("instruct", "joint"))
USES: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "generate": ("draws no pictures", (*_JOINT, _CONNECTOR, ("bootstrap", "diffusion"))),
    "edit": ("edits no pictures", _JOINT),
    "routes": ("routes no tokens", (*_JOINT, _CONNECTOR)),
    "ask": ("answers no questions", (*_JOINT, ("bootstrap", "mllm"))),
    "reconstruct": (
        "reconstructs no pictures",
        (
            *(("tokenizer", phase) for phase in ("init", "decoder", "encoder")),
            *(*_JOINT, _CONNECTOR),
            *(("bootstrap", phase) for phase in ("autoencoder", "diffusion")),
        ),
    ),
}
"""Use -> what a run unfit for it does not do, and the (stage, phase) of those that are fit."""


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


def fit_recipe(run_dir: Path, use: str) -> Recipe:
    """Return the recipe of a run that is fit for a use of `USES`; any other is refused with the kinds that are."""
    recipe = recipe_of(run_dir)
    lack, kinds = USES[use]
    if (recipe.stage, recipe.phase) not in kinds:
        phases = {stage: " or ".join(f"'{phase}'" for of, phase in kinds if of == stage) for stage, _ in kinds}
        named = [f"stage '{stage}', phase {listed}" for stage, listed in phases.items()]
        raise UserError(
            f"{run_dir}: a run of stage '{recipe.stage}', phase '{recipe.phase}', which {lack};"
            f" a run of {', or '.join(named)} is needed"
        )
    return recipe


def load_run(run_dir: Path, use: str) -> TrainedRun:
    """Load a run that is fit for a use."""
    preset = preset_of(fit_recipe(run_dir, use))
    return TrainedRun(preset, *trained_model(run_dir))
