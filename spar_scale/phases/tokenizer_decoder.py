"""Training stage 1, phase decoder: the pixel decoder joins the streams and the fusion. L_p is left out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spar_scale.phases import Phase

if TYPE_CHECKING:
    from spar_scale.config.recipe import Recipe
    from spar_scale.stages import Stage

PHASE = Phase(
    name="tokenizer_decoder",
    training_stage="tokenizer",
    stage_number=1,
    phase="decoder",
    trains="streams, fusion and pixel decoder",
    losses="reconstruction",
    reads=(
        "model.image_size",
        "model.streams",
        "objective.perceptual",
        "objective.perceptual_weight",
        "objective.latent_noise",
    ),
    requires=("pixel_autoencoder",),
    accepts=("mllm",),
    requires_when={"perceptual": ("objective.perceptual", "lpips", "lpips_convnext")},
    vision_only=("mllm",),
    starts_from=("tokenizer_init",),
    used_by=frozenset({"reconstruct"}),
    evaluated_as="reconstruction",
    slurm_script="stage1_tokenizer.sh",
    samples_per_s=150,
)


def build(recipe: Recipe) -> Stage:
    """Build the phase: one learning-rate group, `main` (streams, fusion, decoder)."""
    from spar_scale.stages.tokenizer import Settings, tokenizer_stage

    settings = Settings.of(recipe)
    return tokenizer_stage(recipe, settings, {"main": (*settings.stream_parts, *settings.fusion_parts, "decoder")})
