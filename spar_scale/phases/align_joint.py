"""Training stage 2, phase joint: the diffusion transformer joins, on the tokenizer's latents.

Generation and editing are mixed. The name of a source is its task, generation or editing. With model.alignment
`external` the teacher of the alignment is the vision tower in the pretrained part `teacher`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spar_scale.phases import Phase

if TYPE_CHECKING:
    from spar_scale.config.recipe import Recipe
    from spar_scale.stages import Stage

PHASE = Phase(
    name="align_joint",
    training_stage="align",
    stage_number=2,
    phase="joint",
    trains="queries, routing, connector and diffusion transformer",
    losses="flow matching, L_align",
    reads=(
        "model.routing",
        "model.alignment",
        "objective.align_weight",
        "objective.align_block",
        "objective.timestep_shift",
        "objective.caption_dropout",
        "data.long_captions",
    ),
    requires=("mllm", "tokenizer", "diffusion"),
    requires_when={"teacher": ("model.alignment", "external")},
    vision_only=("teacher",),
    starts_from=("align_connector",),
    used_by=frozenset({"generate", "edit", "routes", "ask", "reconstruct", "export"}),
    slurm_script="stage2_align.sh",
    samples_per_s=70,
    reads_stored_values=True,
    reads_stored_values_in_chain=True,
)


def build(recipe: Recipe) -> Stage:
    """Build the phase: learning-rate groups `main` (conditioning) and `diffusion`."""
    from spar_scale.stages import Stage, align
    from spar_scale.stages.parts import preset_of, pretrained_parts
    from spar_scale.stages.terms import scale_latent

    parts = pretrained_parts(recipe)
    preset, objective = preset_of(recipe), recipe.objective
    spar, language = preset.conditioning, preset.language
    aligned = align.is_aligned(recipe, preset)
    sample = align.conditioned_sample(
        recipe, preset, task="conditioned"
    )  # refuses a wrong tokenizer before weights load
    tokenizer, scale = preset.tokenizer.load(parts["tokenizer"], preset.vision, preset.autoencoder)
    model = align.build_spar(recipe, preset, parts, tokenizer, aligned)
    teacher, teacher_layers = align.alignment_teacher(model, parts, preset) if aligned else ("", [])
    tap = (objective.align_block, align.Alignment(model.get_submodule("alignment_head"), teacher)) if aligned else None
    return Stage(
        model=model,
        layers=[
            *preset.vision.feature_layers(tokenizer, frozen=True),
            *spar.conditioning_layers(model, language, illustrated=True, longest=preset.longest_sequence),
            *preset.tokenizer.latent_layers(tokenizer, align.TARGET),
            scale_latent(scale),
            *teacher_layers,
            *align.drawing_layers(model, preset, objective.timestep_shift, tap),
        ],
        inputs=("images", "tokens", "lengths", "latent_noise", "timestep_draw"),
        terms={"flow_matching": 1.0} | ({"alignment": objective.align_weight} if aligned else {}),
        groups={"main": align.CONDITIONING, "diffusion": ("diffusion", "alignment_head")},
        sample=sample,
        references={name: part.directory for name, part in parts.items()},
        encoding=align.stored_slots(preset, scale, pictures=("latent", *([teacher] if aligned else []))),
        uses=[
            *preset.autoencoder.reconstruction_layers(tokenizer.get_submodule("decoder"), preset.image_size),
            *spar.answering_layers(model, language),
        ],
        decoding=spar.decoding_layers(model, language),
        latent_scale=scale,
    )
