"""Which runs can be used for what, and loading one for use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from parallel.errors import UserError
from spar_scale.config.recipe import Recipe
from spar_scale.data.text import TextTokenizer
from spar_scale.models.presets import Preset
from spar_scale.phases import Command, accepted_by, either, phase_of
from spar_scale.stages.forward import Forward
from spar_scale.stages.parts import text_of
from spar_scale.training.export import recipe_of, trained_forward

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
    """The forward of a run's averaged model in eval mode; as a string, what it is."""

    forward: Forward
    checkpoint: Path

    @property
    def preset(self) -> Preset:
        """The preset of its recipe."""
        return self.forward.preset

    def __str__(self) -> str:
        described = f"the average of {self.checkpoint}, preset '{self.preset.name}'"
        scale = self.forward.stage.latent_scale
        return described if scale is None else f"{described}, latent scale {scale:.4g}"


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


def text_of_run(recipe: Recipe) -> TextTokenizer:
    """Return the tokenizer of a run, before anything else of it is loaded."""
    text = text_of(recipe)
    assert text is not None
    return text


def check_length(num_tokens: int, preset: Preset, queries: int = 0, answer: int = 0) -> None:
    """Refuse a prompt that is too long for a preset with the queries, or with the answer, that follow it."""
    limit = min(preset.language.max_positions - answer, preset.longest_sequence - queries)
    if num_tokens > limit:
        raise UserError(
            f"the prompt has {num_tokens} tokens; preset '{preset.name}' takes up to {limit} before the"
            f" {queries + answer} that follow"
        )


def load_run(run_dir: Path, use: Command) -> TrainedRun:
    """Load a run that is fit for a use."""
    fit_recipe(run_dir, use)
    return TrainedRun(*trained_forward(run_dir))
