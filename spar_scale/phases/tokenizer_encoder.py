"""Training stage 1, phase encoder: the vision tower and the projector join, held by L_s to their initial features.

A weight of L_GAN above 0 adds the discriminator (`stages/adversary.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spar_scale.phases import Phase

if TYPE_CHECKING:
    from spar_scale.config.recipe import Recipe
    from spar_scale.stages import Stage

PHASE = Phase(
    name="tokenizer_encoder",
    training_stage="tokenizer",
    stage_number=1,
    phase="encoder",
    trains="streams, fusion, pixel decoder and vision tower",
    losses="reconstruction, L_s, L_GAN",
    reads=(
        "model.image_size",
        "model.streams",
        "model.encoder",
        "model.semantic_distillation",
        "objective.perceptual",
        "objective.perceptual_weight",
        "objective.latent_noise",
        "objective.semantic_distillation_weight",
        "objective.adversarial_weight",
        "objective.adversarial_start",
        "objective.lecam_weight",
        "discriminator.lr",
        "discriminator.min_lr",
        "discriminator.warmup_steps",
        "discriminator.schedule",
        "discriminator.weight_decay",
    ),
    requires=("pixel_autoencoder",),
    accepts=("mllm",),
    requires_when={"perceptual": ("objective.perceptual", "lpips", "lpips_convnext")},
    vision_only=("mllm",),
    starts_from=("tokenizer_decoder",),
    publishes="tokenizer",
    used_by=frozenset({"reconstruct"}),
    evaluated_as="tokenizer",
    slurm_script="stage1_tokenizer.sh",
    samples_per_s=120,
)


def build(recipe: Recipe) -> Stage:
    """Build the phase: groups `main` (streams, fusion, decoder) and `encoder` (vision tower, projector).

    A frozen encoder leaves the group `encoder` empty, so that the recipe may still name its multiplier.
    """
    from spar_scale.stages.adversary import add_adversary
    from spar_scale.stages.tokenizer import Settings, tokenizer_stage

    settings = Settings.of(recipe)
    groups = {
        "main": (*settings.stream_parts, *settings.fusion_parts, "decoder"),
        "encoder": ("vision_tower", "projector") if settings.encoder_trains else (),
    }
    stage = tokenizer_stage(recipe, settings, groups, lambda_s=settings.lambda_s)
    if recipe.objective.adversarial_weight > 0:
        add_adversary(stage, recipe)
    return stage
