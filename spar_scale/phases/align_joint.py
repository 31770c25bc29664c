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
    ),
    requires=("mllm", "tokenizer", "diffusion"),
    requires_when={"teacher": ("model.alignment", "external")},
    vision_only=("teacher",),
    starts_from=("align_connector",),
    used_by=frozenset({"generate", "edit", "routes", "ask", "reconstruct"}),
    slurm_script="stage2_align.sh",
    samples_per_s=70,
    reads_stored_values=True,
    reads_stored_values_in_chain=True,
)


def build(recipe: Recipe) -> Stage:
    """Build the phase: learning-rate groups `main` (conditioning) and `diffusion`."""
    from spar_scale.stages import Encoding, Stage, align
    from spar_scale.stages.conditioning_layers import conditioning_layers, prefix_layers, prefix_states, query_layers
    from spar_scale.stages.diffusion_layers import ScaleLatent, diffusion_layers
    from spar_scale.stages.parts import preset_of, pretrained_directories
    from spar_scale.stages.tokenizer_files import load_tokenizer
    from spar_scale.stages.tokenizer_layers import encoder_layers, latent_layers

    directories = pretrained_directories(recipe)
    preset, objective = preset_of(recipe), recipe.objective
    aligned = align.is_aligned(recipe, preset)
    tokenizer, scale = load_tokenizer(directories["tokenizer"], preset)
    model = align.build_spar(recipe, preset, directories, tokenizer, scale, aligned)
    seen, drawn = encoder_layers(tokenizer, frozen=True), [*latent_layers(tokenizer), ScaleLatent(scale)]
    tap, teacher = None, ()
    if aligned:
        slot, layers = align.alignment_teacher(model, directories, preset)
        tap, teacher = align.alignment_tap(model, recipe, slot), (slot,)
        drawn += layers
    drawing = diffusion_layers(model.diffusion, preset.conditioning.num_queries, objective.timestep_shift, tap)
    return Stage(
        model=model,
        layers=[*seen, *conditioning_layers(model, illustrated=True), *drawn, *drawing],
        inputs=("images", "tokens", "keep", "latent_noise", "timestep_draw"),
        terms={"flow_matching": 1.0} | ({"alignment": objective.align_weight} if aligned else {}),
        groups={"main": align.CONDITIONING, "diffusion": ("diffusion", "alignment_head")},
        sample=align.conditioned_sample(preset, objective.caption_dropout, task="conditioned"),
        references=directories,
        encoding=Encoding(
            layers=[*seen, *prefix_layers(model, illustrated=True), *drawn],
            text=prefix_layers(model, illustrated=False),
            pictures=("latent", *teacher),
            states=prefix_states(model),
            remaining=[*query_layers(model), *drawing],
            constants={"latent_scale": scale},
        ),
    )
