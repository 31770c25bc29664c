"""Training stages 2 and 3: the diffusion transformer learns to draw from hidden states of the language model.

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
from typing import TYPE_CHECKING

from torch import Tensor

from parallel.errors import UserError
from parallel.program import Layer
from spar_scale.data.spec import Draw, SampleSpec
from spar_scale.models.initialise import initialise
from spar_scale.models.presets import Preset
from spar_scale.models.tokenizer import InitialEncoder, UnifiedTokenizer
from spar_scale.models.unified import SPAR, PixelTokenizer
from spar_scale.stages.diffusion_layers import Alignment
from spar_scale.stages.parts import copy_weights, load_diffusion, load_mllm, load_vision

if TYPE_CHECKING:
    from spar_scale.config.recipe import Recipe

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


def build_spar(
    recipe: Recipe,
    preset: Preset,
    directories: dict[str, Path],
    tokenizer: UnifiedTokenizer | PixelTokenizer,
    scale: float,
    aligned: bool,
) -> SPAR:
    """Return the whole model: pretrained parts from `directories`, new parts from the seed.

    Where the preset asks for it, the connector starts as a copy of the language model's last layers.
    """
    model = SPAR(preset, load_mllm(directories["mllm"], preset), tokenizer, scale, recipe.model.routing, aligned)
    copy_weights(model.diffusion.transformer, load_diffusion(directories["diffusion"], preset))
    initialise(model, recipe.seed, loaded=("tokenizer", "language_model", "lm_head", "diffusion"))
    if preset.conditioning.connector_copies:
        model.connector.copy_last_layers(model.language_model)
    return model


def is_aligned(recipe: Recipe, preset: Preset) -> bool:
    """Tell whether the loss has L_align. Raises UserError for a block that the diffusion transformer does not have."""
    objective = recipe.objective
    aligned = recipe.model.alignment != "none" and objective.align_weight > 0
    if aligned and objective.align_block > preset.diffusion.layers:
        raise UserError(
            f"objective.align_block: found {objective.align_block}; the diffusion transformer of preset"
            f" '{preset.name}' has blocks 1 to {preset.diffusion.layers}"
        )
    return aligned


def alignment_teacher(model: SPAR, directories: dict[str, Path], preset: Preset) -> tuple[str, list[Layer]]:
    """Return the slot with the teacher's features, and the layers that write it.

    An external teacher (pretrained part `teacher`) becomes `model.teacher`. Otherwise the teacher is the tokenizer's
    vision tower, whose `features` other layers write.
    """
    if "teacher" not in directories:
        return "features", []
    model.teacher = InitialEncoder(preset)
    tower, projector = load_vision(directories["teacher"], preset, part="teacher")
    copy_weights(model.teacher.vision_tower, tower)
    copy_weights(model.teacher.projector, projector)
    return "teacher", [ExternalTeacher(model.teacher)]


def alignment_tap(model: SPAR, recipe: Recipe, teacher: str) -> tuple[int, Alignment]:
    """Return the block whose features are aligned, and the layer with the term `alignment`."""
    return recipe.objective.align_block, Alignment(model.alignment_head, teacher)
