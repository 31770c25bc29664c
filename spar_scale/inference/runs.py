"""Which runs and exported directories can be used for what, and loading one for use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from parallel.errors import UserError
from parallel.launch.world import device_type
from spar_scale.config.recipe import Recipe
from spar_scale.data.spec import Fit, sources_of
from spar_scale.data.text import TextTokenizer
from spar_scale.inference.exports import DTYPES, exported_recipe, exported_stage, is_export, read_record
from spar_scale.models.presets import Preset
from spar_scale.phases import Command, accepted_by, either, phase_of
from spar_scale.stages.forward import Forward
from spar_scale.stages.parts import preset_of, text_of
from spar_scale.training.export import recipe_of, trained_forward

LACKS: dict[Command, str] = {
    "generate": "draws no pictures",
    "edit": "edits no pictures",
    "routes": "routes no tokens",
    "ask": "answers no questions",
    "reconstruct": "reconstructs no pictures",
    "export": "does not train all of SPAR",
}
"""Command -> what a run that it refuses does not do. The declarations of the phases say which runs it accepts."""


@dataclass(frozen=True)
class TrainedRun:
    """The forward of an averaged model in eval mode; as a string, what it is and where it comes from."""

    forward: Forward
    origin: str
    fit: Fit
    """How a picture to edit becomes a square."""

    @property
    def preset(self) -> Preset:
        """The preset of its recipe."""
        return self.forward.preset

    def __str__(self) -> str:
        described = f"{self.origin}, preset '{self.preset.name}'"
        scale = self.forward.stage.latent_scale
        return described if scale is None else f"{described}, latent scale {scale:.4g}"


def fit_recipe(run_dir: Path, use: Command) -> Recipe:
    """Return the recipe of a run or an exported directory that a command accepts.

    Raises UserError for any other, with the phases that are accepted.
    """
    recipe = exported_recipe(run_dir) if is_export(run_dir) else recipe_of(run_dir)
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


def editing_fit(recipe: Recipe) -> Fit:
    """Return how a picture to edit becomes a square: as those that the run was trained on."""
    fits: list[Fit] = [source.fit for source in sources_of(recipe) if (source.task or source.name) == "editing"]
    return fits[0] if fits else "crop"


def text_of_run(recipe: Recipe) -> TextTokenizer:
    """Return the tokenizer of a run, before anything else of it is loaded."""
    text = text_of(recipe)
    assert text is not None
    return text


def generation_prompt(preset: Preset, text: TextTokenizer, typed: str) -> tuple[str, list[int]]:
    """Return what was typed as the tokenizer reads it, and its tokens.

    Raises UserError for an empty text, unknown words and too many.
    """
    words = text.normalize(typed, "prompt")
    return words, _fitting(text.generation_prompt(words), preset, queries=preset.conditioning.num_queries)


def editing_prompt(preset: Preset, text: TextTokenizer, typed: str) -> tuple[str, list[int]]:
    """Return the same of an instruction, with the tokens of the picture."""
    words = text.normalize(typed, "prompt")
    tokens = text.editing_prompt(words, preset.image_tokens)
    return words, _fitting(tokens, preset, queries=preset.conditioning.num_queries)


def question_prompt(preset: Preset, text: TextTokenizer, typed: str) -> tuple[str, list[int]]:
    """Return the same of a question, with the tokens of the picture."""
    words = text.normalize(typed, "question")
    tokens = text.question_prompt(words, preset.image_tokens)
    return words, _fitting(tokens, preset, answer=text.templates.answer_tokens)


def load_run(
    run_dir: Path, use: Command, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> TrainedRun:
    """Load a run or an exported directory that is fit for a use.

    The device is by default cuda where torch sees a GPU, else cpu. The dtype of the weights is by default fp32 on the
    CPU, which computes slowly in bf16, else the precision of the run.
    """
    recipe = fit_recipe(run_dir, use)
    device = torch.device(device or device_type())
    if is_export(run_dir):
        record = read_record(run_dir)
        precision, origin = record.precision, f"the average in {run_dir}"
        forward = Forward(exported_stage(run_dir), preset_of(recipe))
    else:
        forward, checkpoint = trained_forward(run_dir)
        precision, origin = recipe.precision, f"the average of {checkpoint}"
    forward.stage.model.to(device, dtype or (torch.float32 if device.type == "cpu" else DTYPES[precision]))
    return TrainedRun(forward, origin, editing_fit(recipe))


def _fitting(tokens: list[int], preset: Preset, queries: int = 0, answer: int = 0) -> list[int]:
    """Return a prompt that is not too long for a preset with the queries, or with the answer, that follow it."""
    limit = min(preset.language.max_positions - answer, preset.longest_sequence - queries)
    if len(tokens) > limit:
        raise UserError(
            f"the prompt has {len(tokens)} tokens; preset '{preset.name}' takes up to {limit} before the"
            f" {queries + answer} that follow"
        )
    return tokens
