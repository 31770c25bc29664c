"""Training stage 2, phase connector: queries, routing and connector learn to steer a frozen diffusion transformer.

It draws in the latent space of the pixel autoencoder, because the frozen diffusion transformer knows no other. It
generates only, so a source may have any name.
"""

from __future__ import annotations

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
    reads=("model.routing", "objective.timestep_shift", "objective.caption_dropout"),
    requires=("mllm", "pixel_autoencoder", "diffusion"),
    used_by=frozenset({"generate", "routes", "reconstruct"}),
    slurm_script="stage2_align.sh",
    samples_per_s=100,
    reads_stored_values=True,
)


def build(recipe: Recipe) -> Stage:
    """Build the phase: one learning-rate group, `main` (queries, routing, connector)."""
    from spar_scale.models.unified import PixelTokenizer
    from spar_scale.stages import Encoding, Stage
    from spar_scale.stages.align import CONDITIONING, build_spar, conditioned_sample
    from spar_scale.stages.conditioning_layers import conditioning_layers, prefix_layers, prefix_states, query_layers
    from spar_scale.stages.diffusion_layers import AutoencoderLatent, diffusion_layers
    from spar_scale.stages.parts import load_autoencoder, preset_of, pretrained_directories

    directories = pretrained_directories(recipe)
    preset = preset_of(recipe)
    autoencoder, scale = load_autoencoder(directories["pixel_autoencoder"], preset)
    tokenizer = PixelTokenizer(autoencoder, preset)
    model = build_spar(recipe, preset, directories, tokenizer, scale, aligned=False)
    latent = AutoencoderLatent(tokenizer, scale)
    drawing = diffusion_layers(model.diffusion, preset.conditioning.num_queries, recipe.objective.timestep_shift)
    text = prefix_layers(model, illustrated=False)
    return Stage(
        model=model,
        layers=[*conditioning_layers(model, illustrated=False), latent, *drawing],
        inputs=("images", "tokens", "keep", "latent_noise", "timestep_draw"),
        terms={"flow_matching": 1.0},
        groups={"main": CONDITIONING},
        sample=conditioned_sample(preset, recipe.objective.caption_dropout, task="generation"),
        references=directories,
        encoding=Encoding(
            layers=[*text, latent],
            text=text,
            pictures=("latent",),
            states=prefix_states(model),
            remaining=[*query_layers(model), *drawing],
            constants={"latent_scale": scale},
        ),
    )
