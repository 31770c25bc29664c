"""Training stage 2, phase connector: queries, routing and connector learn to steer a frozen diffusion transformer.

It draws in the latent space of the pixel autoencoder, because the frozen diffusion transformer knows no other. It
generates only, so a source may have any name.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from spar_scale.phases import Phase

if TYPE_CHECKING:
    from spar_scale.config.recipe import Recipe
    from spar_scale.stages import Stage

PHASE = Phase(
    name="align_connector",
    training_stage="align",
    stage_number=2,
    phase="connector",
    trains="queries, routing, connector",
    losses="flow matching",
    reads=("model.routing", "objective.timestep_shift", "objective.caption_dropout", "data.long_captions"),
    requires=("mllm", "pixel_autoencoder", "diffusion"),
    used_by=frozenset({"generate", "routes", "reconstruct"}),
    slurm_script="stage2_align.sh",
    samples_per_s=100,
    reads_stored_values=True,
)


def build(recipe: Recipe) -> Stage:
    """Build the phase: one learning-rate group, `main` (queries, routing, connector)."""
    from spar_scale.stages import Stage, align
    from spar_scale.stages.parts import preset_of, pretrained_parts
    from spar_scale.stages.terms import scale_latent, select_target

    parts = pretrained_parts(recipe)
    preset = preset_of(recipe)
    pixels, spar = preset.autoencoder, preset.conditioning
    side = preset.grid * pixels.compression  # pixels: the size whose latent has the tokens' grid
    # Refuses a wrong tokenizer before weights load. Only the autoencoder sees the picture: it is loaded at its size.
    sample = replace(align.conditioned_sample(recipe, preset, task="generation"), image_size=side)
    tokenizer, scale = pixels.load(parts["pixel_autoencoder"])
    model = align.build_spar(recipe, preset, parts, tokenizer, aligned=False)
    encoder, decoder = (tokenizer.get_submodule(name) for name in ("encoder", "decoder"))
    return Stage(
        model=model,
        layers=[
            *spar.conditioning_layers(model, preset.language, illustrated=False, longest=preset.longest_sequence),
            select_target(),
            pixels.encoding_layer(encoder, frozen=True, side=side, reads="target_image"),
            scale_latent(scale),
            *align.drawing_layers(model, preset, recipe.objective.timestep_shift),
        ],
        inputs=("images", "tokens", "lengths", "latent_noise", "timestep_draw"),
        terms={"flow_matching": 1.0},
        groups={"main": align.CONDITIONING},
        sample=sample,
        references={name: part.directory for name, part in parts.items()},
        encoding=align.stored_slots(preset, scale, pictures=("latent",)),
        uses=pixels.reconstruction_layers(decoder, preset.image_size),
        latent_scale=scale,
    )
