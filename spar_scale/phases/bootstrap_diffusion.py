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
    reads=("objective.timestep_shift", "objective.caption_dropout"),
    requires=("pixel_autoencoder",),
    publishes="diffusion",
    used_by=frozenset({"generate", "reconstruct"}),
    slurm_script="stage0_bootstrap.sh",
    samples_per_s=90,
)


def build(recipe: Recipe) -> Stage:
    """Build the phase; it publishes the layout of SanaTransformer2DModel."""
    from spar_scale.models.initialise import initialise
    from spar_scale.models.unified import PixelTokenizer
    from spar_scale.stages import Export, Stage
    from spar_scale.stages.align import conditioned_sample
    from spar_scale.stages.bootstrap_diffusion import CaptionedDiffusion, EncodeText, save_diffusion
    from spar_scale.stages.diffusion_layers import AutoencoderLatent, diffusion_layers
    from spar_scale.stages.parts import load_autoencoder, preset_of, pretrained_directories

    directories = pretrained_directories(recipe)
    preset = preset_of(recipe)
    autoencoder, scale = load_autoencoder(directories["pixel_autoencoder"], preset)
    tokenizer = PixelTokenizer(autoencoder, preset)
    model = CaptionedDiffusion(preset, tokenizer, scale)
    initialise(model, recipe.seed, loaded=("tokenizer",))
    return Stage(
        model=model,
        layers=[
            EncodeText(model.text_encoder),
            AutoencoderLatent(tokenizer, scale),
            *diffusion_layers(model.diffusion, 0, recipe.objective.timestep_shift),
        ],
        inputs=("images", "tokens", "keep", "latent_noise", "timestep_draw"),
        terms={"flow_matching": 1.0},
        groups={"main": ("diffusion", "text_encoder")},
        sample=conditioned_sample(preset, recipe.objective.caption_dropout, task="generation"),
        references=directories,
        export=Export(save_diffusion),
    )
