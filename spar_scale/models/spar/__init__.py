"""What SPAR adds: queries, routing, connector, and the whole model. What other code uses of them is here."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from parallel.program import Layer
from parallel.tensor import Plan
from spar_scale.models.published import PretrainedPart
from spar_scale.models.roles import DiffusionModel, LanguageModel, VisionEncoder
from spar_scale.models.spar import layers, model, sharding, weights
from spar_scale.models.spar.routing import Kind
from spar_scale.models.spar.shapes import ConditioningShape, SamplingShape

__all__ = ["Conditioning", "ConditioningShape", "SamplingShape"]


class Conditioning(ConditioningShape):
    """Queries, routing and connector of SPAR (role `ConditioningModel`)."""

    @property
    def plan(self) -> Plan:
        """How it is cut over tensor-parallel ranks."""
        return sharding.PLAN

    @property
    def tensor_sizes(self) -> dict[str, int]:
        """The sizes that a tensor-parallel size must divide: none of its own."""
        return {}

    def assemble(
        self,
        language: LanguageModel,
        vision: VisionEncoder,
        diffusion: DiffusionModel,
        parts: dict[str, PretrainedPart],
        tokenizer: nn.Module,
        *,
        seed: int,
        routing: Kind,
        aligned: bool,
    ) -> nn.Module:
        """Return SPAR around a loaded tokenizer: pretrained parts out of `parts`, new ones from the seed."""
        return weights.assemble(self, language, vision, diffusion, parts, tokenizer, seed, routing, aligned)

    def conditioning_layers(
        self, spar: nn.Module, language: LanguageModel, illustrated: bool, longest: int
    ) -> list[Layer]:
        """Return the way from `tokens` and `lengths` (and `features`, where `illustrated`) to `captions`.

        No prompt with its queries has more than `longest` tokens.
        """
        return layers.conditioning_layers(cast(model.SPAR, spar), language, illustrated, longest)

    def answering_layers(self, spar: nn.Module, language: LanguageModel) -> list[Layer]:
        """Return the way from the prompt's last state to `logits`."""
        return layers.answering_layers(cast(model.SPAR, spar), language)

    def decoding_layers(self, spar: nn.Module, language: LanguageModel) -> list[Layer]:
        """Return the way of one further `token` at `position` to its `logits`."""
        found = cast(Any, spar)
        return language.decoding_layers(found.language_model, found.lm_head)

    def prompt_states(self, language: LanguageModel) -> tuple[str, ...]:
        """Return the slots of the prompt's hidden states, which depend on the sample alone."""
        return layers.prompt_states(language)
