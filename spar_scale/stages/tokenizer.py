"""Training stage 1, the unified tokenizer. Its phases differ in what trains and in the losses:

    phase     trains                              losses (SPAR, tokenizer stages I, II, III)
    init      streams, fusion                     L_MSE, perceptual, lambda_p L_p
    decoder   streams, fusion, decoder            L_MSE, perceptual
    encoder   vision tower, projector and those   L_MSE, perceptual, lambda_s L_s

L_p = MSE(z_p, E_p'(I)) against the frozen pixel encoder, L_s = MSE(f_v, f_v') against `initial_encoder`,
the vision tower and projector as they were when the stage began: both start from the same weights, and
the earlier phases keep theirs frozen, so a phase that starts from another finds them still equal. L_p
needs no L_s beside it. objective.perceptual chooses the perceptual term: the miniature's `gradient_difference`, which
is no perceptual network, or LPIPS with or without ConvNeXt (`perceptual.py`).

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
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from parallel.program import Apply, Layer
from spar_scale.config.recipe import ModelConfig, ObjectiveConfig, Recipe, Section
from spar_scale.data.spec import Draw, SampleSpec
from spar_scale.models.dual_stream import DualStream, Streams, to_grid
from spar_scale.models.initialise import initialise
from spar_scale.models.presets import Preset
from spar_scale.models.published import PretrainedPart, copy_weights, parameters_on_meta
from spar_scale.objectives.distillation import semantic_distillation
from spar_scale.objectives.reconstruction import mean_squared_error
from spar_scale.phases import phase_of
from spar_scale.stages import Export, LatentScale, Stage
from spar_scale.stages.parts import note_random_part, preset_of, pretrained_parts
from spar_scale.stages.perceptual import PART, perceptual_loss
from spar_scale.stages.terms import decode_latent, reconstruction_terms

if TYPE_CHECKING:
    from pathlib import Path

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
    model: nn.Module,
    preset: Preset,
    frozen_encoder: bool,
    latent_noise: float = 0.0,
    perceptual: Layer | None = None,
) -> list[Layer]:
    """Return the tokenizer's training forward, with a loss for each teacher that the model has.

    `latent_noise` is the deviation of the noise before the decoder; `perceptual` is the layer of the perceptual loss,
    None for the difference of gradients.
    """
    vision, pixels = preset.vision, preset.autoencoder
    layers: list[Layer] = []
    if hasattr(model, "initial_encoder"):
        layers += vision.feature_layers(model.get_submodule("initial_encoder"), frozen=True, writes="initial_features")
    layers += vision.feature_layers(model, frozen_encoder)
    if hasattr(model, "initial_encoder"):
        layers.append(Apply(semantic_distillation, ("features", "initial_features"), "semantic_distillation"))
    layers += preset.tokenizer.latent_layers(model)
    if hasattr(model, "pixel_encoder"):
        encoder = model.get_submodule("pixel_encoder")
        layers += [
            pixels.encoding_layer(encoder, frozen=True, writes="teacher_latent"),
            Apply(_pixel_alignment, ("pixel_latent", "teacher_latent"), "pixel_alignment"),
        ]
    decoder = pixels.reconstruction_layers(model.get_submodule("decoder"), preset.image_size)
    layers += [decode_latent(latent_noise), *decoder, reconstruction_terms(gradients=perceptual is None)]
    return layers if perceptual is None else [*layers, perceptual]


def tokenizer_stage(
    recipe: Recipe, settings: Settings, groups: dict[str, tuple[str, ...]], lambda_p: float = 0, lambda_s: float = 0
) -> Stage:
    """Build a phase of the tokenizer; a loss of weight 0 is left out together with its teacher."""
    parts = pretrained_parts(recipe)
    preset = preset_of(recipe)
    tokenizer = preset.tokenizer
    assert isinstance(tokenizer, DualStream)
    with parameters_on_meta():  # most are read
        model = tokenizer.build(preset.vision, preset.autoencoder, settings.streams, lambda_p > 0, lambda_s > 0)
    trains_encoder = "vision_tower" in groups.get("encoder", ())
    _load_pretrained(model, parts, preset)
    initialise(model, recipe.seed)
    if hasattr(model, "initial_encoder"):
        for name in ("vision_tower", "projector"):
            copy_weights(model.get_submodule(f"initial_encoder.{name}"), model.get_submodule(name))
    if "mllm" not in parts and trains_encoder:
        _log.warning(
            "model.pretrained.mllm is not given: the part is initialised from seed %d, and this phase trains it",
            recipe.seed,
        )
    elif "mllm" not in parts:
        note_random_part("mllm", recipe.seed)
    perceptual = perceptual_loss(recipe, parts[PART]) if PART in parts else None
    distance = "gradient_difference" if perceptual is None else "perceptual"
    terms = {"mean_squared_error": 1.0, distance: recipe.objective.perceptual_weight}
    optional = {"pixel_alignment": lambda_p, "semantic_distillation": lambda_s}
    level = recipe.objective.latent_noise
    draws = {"latent_noise": Draw(preset.latent_shape, "normal")} if level > 0 else {}

    def save(stage: Stage, directory: Path, scale: LatentScale | None) -> None:
        assert scale is not None
        tokenizer.save(stage.model, directory, preset.name, scale.value, scale.pictures)

    return Stage(
        model=model,
        layers=tokenizer_layers(model, preset, not trains_encoder, level, perceptual),
        inputs=("images", *draws),
        terms=terms | {name: weight for name, weight in optional.items() if weight > 0},
        groups=groups,
        sample=SampleSpec(task="images", image_size=preset.image_size, draws=draws),
        references={name: part.directory for name, part in parts.items()},
        export=Export(save, calibrated=True) if phase_of(recipe).publishes else None,
    )


def _load_pretrained(model: nn.Module, parts: dict[str, PretrainedPart], preset: Preset) -> None:
    """Copy the pretrained parts into the model."""
    autoencoder, _ = preset.autoencoder.load(parts["pixel_autoencoder"])
    copies = [("decoder", autoencoder.get_submodule("decoder"))]
    if hasattr(model, "pixel_encoder"):
        copies.append(("pixel_encoder", autoencoder.get_submodule("encoder")))
    if "mllm" in parts:
        encoder = preset.vision.load(parts["mllm"])
        copies += [(name, encoder.get_submodule(name)) for name in ("vision_tower", "projector")]
    for name, source in copies:
        copy_weights(model.get_submodule(name), source)


def _pixel_alignment(pixel_latent: Tensor, teacher_latent: Tensor) -> Tensor:
    """Return L_p (B,) of z_p (B, N, C) against the pixel encoder's latent (B, C, h, h).

    Where the autoencoder has fewer positions than the tower has tokens (14 and 16 on a side of the published parts at
    448 pixels), its latent is interpolated, as in the authors' code: the teacher sees the picture at its own size.
    """
    grid = to_grid(pixel_latent)
    if teacher_latent.shape != grid.shape:
        teacher_latent = F.interpolate(teacher_latent.float(), size=grid.shape[-2:], mode="bilinear")
    return mean_squared_error(grid, teacher_latent)


def _with_defaults(section: Any, schema: type[Section]) -> Callable[[str], Any]:
    return lambda key: getattr(section, key, schema.model_fields[key].default)
