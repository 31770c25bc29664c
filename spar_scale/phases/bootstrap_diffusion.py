"""Training stage 0, for the miniature only: the diffusion transformer that training stage 2 takes as pretrained.

It draws latents of the pixel autoencoder from captions. Its text encoder (`stages/bootstrap_diffusion.py`) is not
published.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spar_scale.phases import Phase

if TYPE_CHECKING:
    from spar_scale.config.recipe import Recipe
    from spar_scale.stages import Stage

PHASE = Phase(
    name="bootstrap_diffusion",
    training_stage="bootstrap",
    stage_number=0,
    phase="diffusion",
    trains="diffusion transformer, on captions",
    losses="flow matching",
    reads=("objective.timestep_shift", "objective.caption_dropout", "data.long_captions"),
    requires=("pixel_autoencoder",),
    publishes="diffusion",
    used_by=frozenset({"generate", "reconstruct"}),
    slurm_script="stage0_bootstrap.sh",
    samples_per_s=90,
)


def build(recipe: Recipe) -> Stage:
    """Build the phase; it publishes the layout of SanaTransformer2DModel."""
    from spar_scale.models.initialise import initialise
    from spar_scale.stages import Export, Stage
    from spar_scale.stages.align import conditioned_sample, drawing_layers
    from spar_scale.stages.bootstrap_diffusion import CaptionedDiffusion, EncodeText
    from spar_scale.stages.parts import preset_of, pretrained_parts
    from spar_scale.stages.terms import scale_latent, select_target

    parts = pretrained_parts(recipe)
    preset = preset_of(recipe)
    pixels, diffusion = preset.autoencoder, preset.diffusion
    tokenizer, scale = pixels.load(parts["pixel_autoencoder"])
    model = CaptionedDiffusion(preset, tokenizer)
    initialise(model, recipe.seed, loaded=("tokenizer",))
    encoder, decoder = (tokenizer.get_submodule(name) for name in ("encoder", "decoder"))
    side = preset.grid * pixels.compression  # the size whose latent has the tokens' grid
    return Stage(
        model=model,
        layers=[
            EncodeText(model.text_encoder),
            select_target(),
            pixels.encoding_layer(encoder, frozen=True, side=side, reads="target_image"),
            scale_latent(scale),
            *drawing_layers(model, preset, recipe.objective.timestep_shift),
        ],
        inputs=("images", "tokens", "lengths", "latent_noise", "timestep_draw"),
        terms={"flow_matching": 1.0},
        groups={"main": ("diffusion", "text_encoder")},
        sample=conditioned_sample(recipe, preset, task="generation"),
        references={name: part.directory for name, part in parts.items()},
        export=Export(lambda stage, directory, _: diffusion.save(stage.model.get_submodule("diffusion"), directory)),
        uses=pixels.reconstruction_layers(decoder, preset.image_size),
        latent_scale=scale,
    )
