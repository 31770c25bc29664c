"""Training stage 1, phase init: the streams and the fusion train beside a frozen encoder and a frozen decoder.

Without the part `mllm` the vision tower and the projector are initialised from the seed, which is logged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spar_scale.phases import Phase

if TYPE_CHECKING:
    from spar_scale.config.recipe import Recipe
    from spar_scale.stages import Stage

PHASE = Phase(
    name="tokenizer_init",
    training_stage="tokenizer",
    stage_number=1,
    phase="init",
    trains="streams and fusion",
    losses="reconstruction, L_p",
    reads=(
        "model.image_size",
        "model.streams",
        "model.pixel_alignment",
        "objective.perceptual",
        "objective.perceptual_weight",
        "objective.latent_noise",
        "objective.pixel_alignment_weight",
    ),
    requires=("pixel_autoencoder",),
    accepts=("mllm",),
    requires_when={"perceptual": ("objective.perceptual", "lpips", "lpips_convnext")},
    vision_only=("mllm",),
    used_by=frozenset({"reconstruct"}),
    evaluated_as="reconstruction",
    slurm_script="stage1_tokenizer.sh",
    samples_per_s=175,
)


def build(recipe: Recipe) -> Stage:
    """Build the phase: learning-rate groups `main` (streams) and `fusion`."""
    from spar_scale.stages.tokenizer import Settings, tokenizer_stage

    settings = Settings.of(recipe)
    groups = {"main": settings.stream_parts, "fusion": settings.fusion_parts}
    return tokenizer_stage(recipe, settings, groups, lambda_p=settings.lambda_p)
