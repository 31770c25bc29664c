"""Stages 2 and 3: the diffusion transformer learns to draw from what the language model says.

    phase               trains                                        losses
    align connector     queries, routing, connector                   L_FM
    align joint         those, diffusion transformer, alignment head  L_FM + lambda_a L_align
    instruct joint      the same, on instruction data                 the same

The language model, the tokenizer and its vision tower stay frozen. Phase connector draws in the latent
space of the pixel autoencoder, because a frozen diffusion transformer knows no other; it generates only.
The later phases draw in the tokenizer's, and mix generation with editing, where the picture to edit
conditions twice: as tokens of the prompt through the language model, and as its features put back over
the routed tokens. The vision tower sees target and reference in one pass: its features of the target
are the teacher of the alignment and, through the streams, the latent.

Switches of the ablations: model.routing (dynamic | last_layer | uniform); model.alignment (self: the
tokenizer's features; none; external: those of the vision tower in model.pretrained.teacher).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from parallel.errors import UserError
from parallel.program import Layer
from spar_scale.data.spec import Draw, SampleSpec
from spar_scale.models.initialise import initialise
from spar_scale.models.presets import Preset
from spar_scale.models.tokenizer import InitialEncoder, UnifiedTokenizer
from spar_scale.models.unified import SPAR, PixelTokenizer
from spar_scale.stages import Encoding, Stage
from spar_scale.stages.conditioning_layers import conditioning_layers, prefix_layers, prefix_states, query_layers
from spar_scale.stages.diffusion_layers import Alignment, AutoencoderLatent, ScaleLatent, diffusion_layers
from spar_scale.stages.parts import (
    copy_weights,
    load_autoencoder,
    load_diffusion,
    load_mllm,
    load_vision,
    preset_of,
    pretrained_directories,
)
from spar_scale.stages.tokenizer_files import load_tokenizer
from spar_scale.stages.tokenizer_layers import encoder_layers, latent_layers

CONDITIONING = ("queries", "routing", "connector")


class ExternalTeacher(Layer):
    """The target among `images` through a frozen encoder of its own to `teacher`."""

    reads = ("images",)
    writes = ("teacher",)
    detached = frozenset(writes)

    def __init__(self, encoder: InitialEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Encode."""
        return {"teacher": self.encoder(images[:, 0])}


def connector(recipe: Any) -> Stage:
    """Build phase `connector`: one group, `main` (queries, routing, connector).

    Reads from the recipe model.preset, model.pretrained.{mllm, pixel_autoencoder, diffusion}, all
    required, model.routing, seed and objective.{caption_dropout, timestep_shift}. Any name of a source will do.
    """
    parts = ("mllm", "pixel_autoencoder", "diffusion")
    directories = pretrained_directories(recipe, allowed=parts, required=parts)
    preset = preset_of(recipe)
    autoencoder, scale = load_autoencoder(directories["pixel_autoencoder"], preset)
    tokenizer = PixelTokenizer(autoencoder, preset)
    model = _model(recipe, preset, directories, tokenizer, scale, aligned=False)
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


def joint(recipe: Any) -> Stage:
    """Build phase `joint` of the stages align and instruct: groups `main` (conditioning) and `diffusion`.

    Reads from the recipe model.preset, model.pretrained.{mllm, tokenizer, diffusion}, all required,
    model.pretrained.teacher where model.alignment is external, model.routing, model.alignment, seed,
    objective.{align_weight, align_block, caption_dropout, timestep_shift}. A source is named after its task,
    generation or editing.
    """
    external = recipe.model.alignment == "external"
    parts = ("mllm", "tokenizer", "diffusion", *(("teacher",) if external else ()))
    directories = pretrained_directories(recipe, allowed=parts, required=parts)
    preset, objective = preset_of(recipe), recipe.objective
    aligned = recipe.model.alignment != "none" and objective.align_weight > 0
    if aligned and objective.align_block > preset.diffusion.layers:
        raise UserError(
            f"objective.align_block: found {objective.align_block}; the diffusion transformer of preset"
            f" '{preset.name}' has blocks 1 to {preset.diffusion.layers}"
        )
    tokenizer, scale = load_tokenizer(directories["tokenizer"], preset)
    model = _model(recipe, preset, directories, tokenizer, scale, aligned)
    seen, drawn = encoder_layers(tokenizer, frozen=True), [*latent_layers(tokenizer), ScaleLatent(scale)]
    tap, teacher = None, ()
    if aligned:
        teacher = ("teacher",) if external else ("features",)
        if external:
            model.teacher = _teacher(directories["teacher"], preset)
            drawn.append(ExternalTeacher(model.teacher))
        tap = objective.align_block, Alignment(model.alignment_head, *teacher)
    drawing = diffusion_layers(model.diffusion, preset.conditioning.num_queries, objective.timestep_shift, tap)
    return Stage(
        model=model,
        layers=[*seen, *conditioning_layers(model, illustrated=True), *drawn, *drawing],
        inputs=("images", "tokens", "keep", "latent_noise", "timestep_draw"),
        terms={"flow_matching": 1.0} | ({"alignment": objective.align_weight} if aligned else {}),
        groups={"main": CONDITIONING, "diffusion": ("diffusion", "alignment_head")},
        sample=conditioned_sample(preset, objective.caption_dropout, task="conditioned"),
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


def conditioned_sample(preset: Preset, caption_dropout: float, task: str) -> SampleSpec:
    """The sample of a picture with the prompt that it is drawn from, its noise and its time."""
    return SampleSpec(
        task=task,
        image_size=preset.image_size,
        num_tokens=preset.conditioning.max_words,
        image_tokens=preset.vision.grid**2,
        caption_dropout=caption_dropout,
        draws={"latent_noise": Draw(preset.latent_shape, "normal"), "timestep_draw": Draw((), "normal")},
    )


def _model(
    recipe: Any,
    preset: Preset,
    directories: dict[str, Path],
    tokenizer: UnifiedTokenizer | PixelTokenizer,
    scale: float,
    aligned: bool,
) -> SPAR:
    """The whole model: what is new from the seed, the connector by its preset."""
    model = SPAR(preset, load_mllm(directories["mllm"], preset), tokenizer, scale, recipe.model.routing, aligned)
    copy_weights(model.diffusion.transformer, load_diffusion(directories["diffusion"], preset))
    initialise(model, recipe.seed, loaded=("tokenizer", "language_model", "lm_head", "diffusion"))
    if preset.conditioning.connector_copies:
        model.connector.copy_last_layers(model.language_model)
    return model


def _teacher(directory: Path, preset: Preset) -> InitialEncoder:
    teacher = InitialEncoder(preset)
    tower, projector = load_vision(directory, preset, part="teacher")
    copy_weights(teacher.vision_tower, tower)
    copy_weights(teacher.projector, projector)
    return teacher
