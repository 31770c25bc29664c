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

from typing import TYPE_CHECKING

from torch import Tensor, nn

from parallel.errors import UserError
from parallel.program import Layer
from spar_scale.data.spec import Draw, SampleSpec
from spar_scale.models.presets import Preset
from spar_scale.models.published import PretrainedPart
from spar_scale.objectives.self_alignment import self_alignment
from spar_scale.stages import Encoding
from spar_scale.stages.parts import text_of
from spar_scale.stages.terms import flow_matching_term, mix_noise, select_target

if TYPE_CHECKING:
    from spar_scale.config.recipe import Recipe

CONDITIONING = ("queries", "routing", "connector")
TARGET, REFERENCES = "target_features", "reference_features"


class Alignment(Layer):
    """The term `alignment` (B,): L_align of the tapped `image_tokens` against a teacher's features."""

    writes = ("alignment",)

    def __init__(self, head: nn.Module, teacher: str):
        super().__init__()
        self.head, self.teacher = head, teacher
        self.reads = ("image_tokens", teacher)

    def forward(self, image_tokens: Tensor, **teacher: Tensor) -> dict[str, Tensor]:
        """Compare."""
        return {"alignment": self_alignment(self.head(image_tokens), teacher[self.teacher])}


def conditioned_sample(recipe: Recipe, preset: Preset, task: str) -> SampleSpec:
    """The sample of a picture with the prompt that it is drawn from, its noise and its time."""
    return SampleSpec(
        task=task,
        image_size=preset.image_size,
        num_tokens=preset.conditioning.max_words,
        image_tokens=preset.image_tokens,
        caption_dropout=recipe.objective.caption_dropout,
        long_captions=recipe.data.long_captions,
        text=text_of(recipe),
        draws={"latent_noise": Draw(preset.latent_shape, "normal"), "timestep_draw": Draw((), "normal")},
    )


def build_spar(
    recipe: Recipe, preset: Preset, parts: dict[str, PretrainedPart], tokenizer: nn.Module, aligned: bool
) -> nn.Module:
    """Return the whole model: pretrained parts out of `parts`, new parts from the seed."""
    return preset.conditioning.assemble(
        preset.language,
        preset.vision,
        preset.diffusion,
        parts,
        tokenizer,
        seed=recipe.seed,
        routing=recipe.model.routing,
        aligned=aligned,
    )


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


def alignment_teacher(model: nn.Module, parts: dict[str, PretrainedPart], preset: Preset) -> tuple[str, list[Layer]]:
    """Return the slot with the teacher's features, and the layers that write it.

    An external teacher (pretrained part `teacher`) becomes `model.teacher`. Otherwise the teacher is the tokenizer's
    vision tower, whose features of the target other layers write.
    """
    if "teacher" not in parts:
        return TARGET, []
    model.teacher = preset.vision.load(parts["teacher"])
    seen = preset.vision.feature_layers(model.teacher, frozen=True, reads="target_image", writes="teacher")
    return "teacher", [select_target(), *seen]


def drawing_layers(model: nn.Module, preset: Preset, shift: float, tap: tuple[int, Layer] | None = None) -> list[Layer]:
    """Return the way from `captions` and `latent` to `velocity` and the term `flow_matching`."""
    velocity = preset.diffusion.velocity_layers(model.get_submodule("diffusion"), preset.longest_sequence, tap)
    return [mix_noise(shift), *velocity, flow_matching_term()]


def stored_slots(preset: Preset, scale: float, pictures: tuple[str, ...]) -> Encoding:
    """Return what of a forward can be stored: slots of the pictures, and the prompt's states."""
    return Encoding(
        pictures=pictures,
        states=preset.conditioning.prompt_states(preset.language),
        constants={"latent_scale": scale},
        without_pictures={REFERENCES: (1, preset.language.width)},
    )
