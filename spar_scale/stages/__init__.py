"""What a phase trains: the model, the forward as a list of layers, the objectives, the data.

The phases themselves are declared in `spar_scale.phases`. Importing this module imports no model library: a phase
imports what it needs when it is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from parallel.errors import UserError
from spar_scale.phases import phase_of

if TYPE_CHECKING:
    from torch import nn

    from parallel.program import Layer
    from spar_scale.config.recipe import Recipe
    from spar_scale.data.spec import SampleSpec
    from spar_scale.stages.companions import Companion


@dataclass(frozen=True)
class LatentScale:
    """The inverse deviation of a tokenizer's latents, and the number of pictures on which it was measured."""

    value: float
    pictures: int


@dataclass(frozen=True)
class Export:
    """How a finished run hands its model on: `write(stage, directory, scale)` in a published layout.

    `calibrated` asks for the scale of the latents, measured on the run's own data; else `scale` is None.
    """

    write: Callable[[Stage, Path, LatentScale | None], None]
    calibrated: bool = False


@dataclass(frozen=True)
class Encoding:
    """The slots of a stage's forward that depend on the sample alone, so that they can be stored once.

    `pictures` follow from a sample's pictures, `states` (B, P, D) from its prompt: one vector for each token, which
    depends on the tokens up to it. `without_pictures` maps a slot of picture features to its shape for one sample; it
    is zero for a prompt without pictures. `constants` are the numbers, beside weights, that stored values depend on.
    """

    pictures: tuple[str, ...]
    states: tuple[str, ...]
    constants: dict[str, float]
    without_pictures: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def slots(self) -> tuple[str, ...]:
        """All stored slots."""
        return (*self.pictures, *self.states)


@dataclass
class Stage:
    """One phase of training, complete but for how it is spread and optimised.

    `model` owns every parameter, and its parameter names are the checkpoint's. `layers` is the forward
    in order, over references to parts of `model`; it reads the batch slots `inputs`. The loss is
    sum_b weight_b * sum_t terms[t] * value_t[b] / global_batch, with one fp32 value (B,) per term.
    `groups` maps a learning-rate group to the parameter-name prefixes that train in it; what matches no
    group is frozen. `references` are the frozen parts that were read from disk. `export` writes what
    later phases load. `companions` are networks that train beside the engine, such as a discriminator.
    `encoding` names the part of the forward that can be read from disk instead of computed.

    `uses` continue the forward where training needs no more: from a latent to a picture, from a hidden state to words.
    `decoding` are the layers of one further token of the language model. `latent_scale` times the tokenizer's latent is
    what a diffusion transformer sees. `Forward` (forward.py) runs parts of all these. `storing` are the layers that
    computed what a stage reads from disk.
    """

    model: nn.Module
    layers: list[Layer]
    inputs: tuple[str, ...]
    terms: dict[str, float]
    groups: dict[str, tuple[str, ...]]
    sample: SampleSpec
    references: dict[str, Path] = field(default_factory=dict)
    export: Export | None = None
    companions: list[Companion] = field(default_factory=list)
    encoding: Encoding | None = None
    uses: list[Layer] = field(default_factory=list)
    decoding: list[Layer] = field(default_factory=list)
    latent_scale: float | None = None
    storing: list[Layer] = field(default_factory=list)

    def encoded(self) -> Stage:
        """Return this stage with the forward that reads stored slots; UserError where there is none."""
        from parallel.program import Subprogram

        if self.encoding is None:
            raise UserError("data.encoded: this phase has no frozen part whose output could be stored; leave it out")
        rest = Subprogram(self.layers, tuple(self.terms), given=self.encoding.slots)
        return replace(self, layers=rest.layers, inputs=rest.inputs, storing=self.storing_layers())

    def storing_layers(self) -> list[Layer]:
        """Return the layers that compute the stored slots."""
        from parallel.program import Subprogram

        assert self.encoding is not None
        return Subprogram(self.layers, self.encoding.slots).layers

    def group_of(self, parameter: str) -> str | None:
        """Return the learning-rate group of a parameter name, None if it is frozen.

        A prefix matches at a dot: `fusion` matches `fusion.norm.weight`, not `fusion_2.weight`.
        """
        for group, prefixes in self.groups.items():
            if any(parameter == prefix or parameter.startswith(f"{prefix}.") for prefix in prefixes):
                return group
        return None


def build(recipe: Recipe, read: bool = True) -> Stage:
    """Build the phase that (recipe.stage, recipe.phase) names, initialised from recipe.seed.

    Parameters outside every group are frozen and their modules put in eval mode. Without `read` the weights of
    pretrained parts stay in their files, for `models.published.read_weights`. Raises UserError for a training stage,
    phase or preset that does not exist and for pretrained parts that cannot be read.
    """
    from spar_scale.models.published import deferred_weights, read_weights

    with deferred_weights():
        stage = phase_of(recipe).build(recipe)
    if read:
        read_weights(stage.model)
    for name, parameter in stage.model.named_parameters():
        parameter.requires_grad_(stage.group_of(name) is not None)
    stage.model.train()
    for layer in (*stage.layers, *stage.uses, *stage.decoding):
        layer.train()
    return stage


def meta_stage(recipe: Recipe) -> Stage:
    """The stage as a run would build it, shapes alone."""
    import torch

    with torch.device("meta"):
        stage = build(recipe)
    return stage if recipe.data.encoded is None else stage.encoded()
