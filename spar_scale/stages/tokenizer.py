"""Training stage 1, the unified tokenizer. Its phases differ in what trains and in the losses:

    phase     trains                              losses (SPAR, tokenizer stages I, II, III)
    init      streams, fusion                     L_MSE, perceptual, lambda_p L_p
    decoder   streams, fusion, decoder            L_MSE, perceptual
    encoder   vision tower, projector and those   L_MSE, perceptual, lambda_s L_s

L_p = MSE(z_p, E_p'(I)) against the frozen pixel encoder, L_s = MSE(f_v, f_v') against `initial_encoder`,
the vision tower and projector as they were when the stage began: both start from the same weights, and
the earlier phases keep theirs frozen, so a phase that starts from another finds them still equal. L_p
needs no L_s beside it. The perceptual term is `gradient_difference`, which is no perceptual network.

objective.latent_noise (not in the paper, 0 by default): the decoder reads the latent with noise of this
deviation, so that what matters for the picture is not written in differences that a diffusion model misses.

Switches of the ablations, the same over all phases of a study:
    model.streams              dual: z_f = F([z_s, z_p]); semantic: z_f = z_s; pixel: z_f = z_p. What is
                               left out has no parameters. Without z_p there is no L_p; L_s stays.
    model.pixel_alignment      false drops L_p and its teacher.
    model.encoder              frozen: phase encoder trains what phase decoder does; L_s, then always 0, goes.
    model.semantic_distillation   false drops L_s and its teacher; the encoder's learning rate stays.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.program import Layer
from spar_scale.config.recipe import ModelConfig, ObjectiveConfig, Recipe, Section
from spar_scale.data.spec import Draw, SampleSpec
from spar_scale.models.initialise import initialise
from spar_scale.models.presets import Preset
from spar_scale.models.tokenizer import Streams, UnifiedTokenizer
from spar_scale.stages import Export, Stage
from spar_scale.stages.bootstrap import ReconstructionLoss
from spar_scale.stages.parts import (
    copy_weights,
    load_autoencoder,
    load_vision,
    note_random_part,
    preset_of,
    pretrained_directories,
)
from spar_scale.stages.pixel_decoder import PerturbLatent, decoder_layers
from spar_scale.stages.tokenizer_files import save_tokenizer
from spar_scale.stages.tokenizer_layers import (
    InitialFeatures,
    PixelAlignment,
    PixelTeacher,
    SemanticDistillation,
    encoder_layers,
    latent_layers,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What a recipe says about the tokenizer, resolved: a loss that is switched off has weight 0."""

    streams: Streams
    encoder_trains: bool  # in the phase that would train it
    lambda_p: float
    lambda_s: float

    @classmethod
    def of(cls, recipe: Recipe) -> Settings:
        """Read them; a key that the recipe does not carry stands at the schema's default."""
        model, objective = _with_defaults(recipe.model, ModelConfig), _with_defaults(recipe.objective, ObjectiveConfig)
        trains = model("encoder") == "trained"
        aligned = model("pixel_alignment") and model("streams") != "semantic"
        return cls(
            streams=model("streams"),
            encoder_trains=trains,
            lambda_p=objective("pixel_alignment_weight") if aligned else 0.0,
            lambda_s=objective("semantic_distillation_weight") if trains and model("semantic_distillation") else 0.0,
        )

    @property
    def stream_parts(self) -> tuple[str, ...]:
        """The streams that exist."""
        return tuple(f"{name}_stream" for name in ("semantic", "pixel") if self.streams in ("dual", name))

    @property
    def fusion_parts(self) -> tuple[str, ...]:
        """The fusion where it exists."""
        return ("fusion",) if self.streams == "dual" else ()


def tokenizer_layers(
    model: UnifiedTokenizer, frozen_encoder: bool, teacher_side: int, latent_noise: float = 0.0
) -> list[Layer]:
    """Return the tokenizer's training forward, with a loss for each teacher that the model has.

    `teacher_side` is the size in pixels of the images that the pixel teacher sees; `latent_noise` the deviation
    of the noise before the decoder.
    """
    layers: list[Layer] = [InitialFeatures(model.initial_encoder)] if hasattr(model, "initial_encoder") else []
    layers += encoder_layers(model, frozen_encoder)
    if hasattr(model, "initial_encoder"):
        layers.append(SemanticDistillation())
    layers += latent_layers(model)
    if hasattr(model, "pixel_encoder"):
        layers += [PixelTeacher(model.pixel_encoder, teacher_side), PixelAlignment()]
    if latent_noise > 0:
        layers.append(PerturbLatent(latent_noise))
    return [*layers, *decoder_layers(model.decoder, model.image_size), ReconstructionLoss()]


def tokenizer_stage(
    recipe: Recipe, settings: Settings, groups: dict[str, tuple[str, ...]], lambda_p: float = 0, lambda_s: float = 0
) -> Stage:
    """Build a phase of the tokenizer; a loss of weight 0 is left out together with its teacher."""
    directories = pretrained_directories(recipe)
    preset = preset_of(recipe)
    model = UnifiedTokenizer(preset, settings.streams, pixel_encoder=lambda_p > 0, initial_encoder=lambda_s > 0)
    trains_encoder = "vision_tower" in groups.get("encoder", ())
    initialise(model, recipe.seed)
    _load_pretrained(model, directories, preset)
    if "mllm" not in directories and trains_encoder:
        _log.warning(
            "model.pretrained.mllm is not given: the part is initialised from seed %d, and this phase trains it",
            recipe.seed,
        )
    elif "mllm" not in directories:
        note_random_part("mllm", recipe.seed)
    terms = {"mean_squared_error": 1.0, "gradient_difference": recipe.objective.perceptual_weight}
    optional = {"pixel_alignment": lambda_p, "semantic_distillation": lambda_s}
    teacher_side, level = preset.vision.grid * preset.autoencoder.compression, recipe.objective.latent_noise
    draws = {"latent_noise": Draw(preset.latent_shape, "normal")} if level > 0 else {}
    return Stage(
        model=model,
        layers=tokenizer_layers(model, not trains_encoder, teacher_side, level),
        inputs=("images", *draws),
        terms=terms | {name: weight for name, weight in optional.items() if weight > 0},
        groups=groups,
        sample=SampleSpec(task="images", image_size=preset.image_size, draws=draws),
        references=directories,
        export=Export(save_tokenizer, calibrated=True),
    )


def _load_pretrained(model: UnifiedTokenizer, directories: dict[str, Path], preset: Preset) -> None:
    """Copy the pretrained parts into the model, and the encoder it then has into the initial encoder."""
    autoencoder, _ = load_autoencoder(directories["pixel_autoencoder"], preset)
    copy_weights(model.decoder, autoencoder.decoder)
    if hasattr(model, "pixel_encoder"):
        copy_weights(model.pixel_encoder, autoencoder.encoder)
    if "mllm" in directories:
        tower, projector = load_vision(directories["mllm"], preset)
        copy_weights(model.vision_tower, tower)
        copy_weights(model.projector, projector)
    if hasattr(model, "initial_encoder"):
        copy_weights(model.initial_encoder.vision_tower, model.vision_tower)
        copy_weights(model.initial_encoder.projector, model.projector)


def _with_defaults(section: Any, schema: type[Section]) -> Callable[[str], Any]:
    return lambda key: getattr(section, key, schema.model_fields[key].default)
