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
    from torch import Tensor, nn

    from parallel.program import Layer
    from spar_scale.config.recipe import Recipe
    from spar_scale.data.spec import SampleSpec
    from spar_scale.stages.companions import Companion


@dataclass(frozen=True)
class Export:
    """How a finished run hands its model on: `write(model, directory, images)` in a published layout.

    `calibrated` asks for images (n, 3, S, S) of the run's own data, on which the scale of the latents is
    measured; else `images` is None.
    """

    write: Callable[[nn.Module, Path, Tensor | None], None]
    calibrated: bool = False


@dataclass(frozen=True)
class Encoding:
    """The part of a stage's forward that depends on the sample alone, so that it can be stored once.

    `layers` compute it from a batch's slots: of its pictures the slots `pictures`, of its prompt the slots
    `states` (B, P, D), one vector for each token, which depends on the tokens up to it. `text` are the
    layers to `states` of a prompt without pictures. `remaining` is the stage's forward from there on; it
    reads the stored slots as inputs and gives bit for bit what all of the stage's layers do. `constants`
    are the numbers, beside weights, that the stored values depend on.
    """

    layers: list[Layer]
    text: list[Layer]
    pictures: tuple[str, ...]
    states: tuple[str, ...]
    remaining: list[Layer]
    constants: dict[str, float]


@dataclass
class Stage:
    """One phase of training, complete but for how it is spread and optimised.

    `model` owns every parameter, and its parameter names are the checkpoint's. `layers` is the forward
    in order, over references to parts of `model`; it reads the batch slots `inputs`. The loss is
    sum_b weight_b * sum_t terms[t] * value_t[b] / global_batch, with one fp32 value (B,) per term.
    `groups` maps a learning-rate group to the parameter-name prefixes that train in it; what matches no
    group is frozen. `references` are the frozen parts that were read from disk. `export` writes what
    later phases load. `companions` are networks that train beside the engine, such as a discriminator.
    `encoding` is the part of the forward that can be read from disk instead of computed.
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

    def encoded(self) -> Stage:
        """Return this stage with the forward that reads stored slots; UserError where there is none."""
        encoding = self.encoding
        if encoding is None:
            raise UserError("data.encoded: this phase has no frozen part whose output could be stored; leave it out")
        stored = {*encoding.pictures, *encoding.states}
        inputs = (*(name for name in self.inputs if name != "images"), *sorted(stored))
        return replace(self, layers=encoding.remaining, inputs=inputs)

    def group_of(self, parameter: str) -> str | None:
        """Return the learning-rate group of a parameter name, None if it is frozen.

        A prefix matches at a dot: `fusion` matches `fusion.norm.weight`, not `fusion_2.weight`.
        """
        for group, prefixes in self.groups.items():
            if any(parameter == prefix or parameter.startswith(f"{prefix}.") for prefix in prefixes):
                return group
        return None


def build(recipe: Recipe) -> Stage:
    """Build the phase that (recipe.stage, recipe.phase) names, initialised from recipe.seed.

    Parameters outside every group are frozen and their modules put in eval mode. Raises UserError for
    a training stage, phase or preset that does not exist and for pretrained parts that cannot be read.
    """
    stage = phase_of(recipe).build(recipe)
    for name, parameter in stage.model.named_parameters():
        parameter.requires_grad_(stage.group_of(name) is not None)
    stage.model.train()
    more = [] if stage.encoding is None else [*stage.encoding.layers, *stage.encoding.text, *stage.encoding.remaining]
    for layer in (*stage.layers, *more):
        layer.train()
    return stage


def meta_stage(recipe: Recipe) -> Stage:
    """The stage as a run would build it, shapes alone."""
    import torch

    with torch.device("meta"):
        stage = build(recipe)
    return stage if recipe.data.encoded is None else stage.encoded()
