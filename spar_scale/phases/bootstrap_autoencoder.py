"""Training stage 0, for the miniature only: AutoencoderDC on reconstruction.

The latent carries noise of a fixed size, drawn with the sample, so that neighbouring latents decode alike (a
diffusion model will draw there later). A penalty above unit power keeps the encoder from outgrowing the noise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spar_scale.phases import Phase

if TYPE_CHECKING:
    from pathlib import Path

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
    from spar_scale.models.initialise import initialise
    from spar_scale.stages import Export, LatentScale, Stage, terms
    from spar_scale.stages.parts import preset_of, pretrained_parts

    pretrained_parts(recipe)
    preset, objective = preset_of(recipe), recipe.objective
    pixels = preset.autoencoder
    model = pixels.build()
    initialise(model, recipe.seed)
    pixels.begin(model)
    side, level = preset.image_size // pixels.compression, objective.latent_noise
    draws = {"latent_noise": Draw((pixels.latent_channels, side, side), "normal")} if level > 0 else {}

    def save(stage: Stage, directory: Path, scale: LatentScale | None) -> None:
        assert scale is not None
        pixels.save(stage.model, directory, scale.value)

    return Stage(
        model=model,
        layers=[
            pixels.encoding_layer(model.get_submodule("encoder"), frozen=False),
            terms.latent_power_term(),
            terms.decode_latent(level),
            *pixels.reconstruction_layers(model.get_submodule("decoder"), preset.image_size),
            terms.reconstruction_terms(),
        ],
        inputs=("images", *draws),
        terms={
            "mean_squared_error": 1.0,
            "gradient_difference": objective.perceptual_weight,
            "latent_power": objective.latent_power_weight,
        },
        groups={"main": ("encoder", "decoder")},
        sample=SampleSpec(task="images", image_size=preset.image_size, draws=draws),
        export=Export(save, calibrated=True),
    )
