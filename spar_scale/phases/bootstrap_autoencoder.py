"""Training stage 0, for the miniature only: AutoencoderDC on reconstruction.

The latent carries noise of a fixed size, drawn with the sample, so that neighbouring latents decode alike (a
diffusion model will draw there later). A penalty above unit power keeps the encoder from outgrowing the noise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spar_scale.phases import Phase

if TYPE_CHECKING:
    from spar_scale.config.recipe import Recipe
    from spar_scale.stages import Stage

PHASE = Phase(
    name="bootstrap_autoencoder",
    training_stage="bootstrap",
    stage_number=0,
    phase="autoencoder",
    trains="pixel autoencoder",
    losses="reconstruction",
    reads=("objective.perceptual_weight", "objective.latent_noise", "objective.latent_power_weight"),
    publishes="pixel_autoencoder",
    used_by=frozenset({"reconstruct"}),
    evaluated_as="reconstruction",
    slurm_script="stage0_bootstrap.sh",
    samples_per_s=230,
)


def build(recipe: Recipe) -> Stage:
    """Build the phase; it publishes the layout of AutoencoderDC."""
    from spar_scale.data.spec import Draw, SampleSpec
    from spar_scale.models.autoencoder import build_autoencoder
    from spar_scale.models.initialise import initialise
    from spar_scale.stages import Export, Stage, bootstrap
    from spar_scale.stages.parts import preset_of, pretrained_directories
    from spar_scale.stages.pixel_decoder import PerturbLatent, decoder_layers

    pretrained_directories(recipe)
    preset, objective = preset_of(recipe), recipe.objective
    model = build_autoencoder(preset)
    initialise(model, recipe.seed)
    bootstrap.begin_with_shortcuts(model)
    side = preset.image_size // preset.autoencoder.compression
    return Stage(
        model=model,
        layers=[
            bootstrap.EncodePixels(model.encoder),
            bootstrap.LatentPower(),
            PerturbLatent(objective.latent_noise),
            *decoder_layers(model.decoder, preset.image_size),
            bootstrap.ReconstructionLoss(),
        ],
        inputs=("images", "latent_noise"),
        terms={
            "mean_squared_error": 1.0,
            "gradient_difference": objective.perceptual_weight,
            "latent_power": objective.latent_power_weight,
        },
        groups={"main": ("encoder", "decoder")},
        sample=SampleSpec(
            task="images",
            image_size=preset.image_size,
            draws={"latent_noise": Draw((preset.autoencoder.latent_channels, side, side), "normal")},
        ),
        export=Export(bootstrap.save_autoencoder, calibrated=True),
    )
