"""Training stage 1, phase high_resolution: phase encoder goes on with larger pictures (`model.image_size`).

The weights do not depend on the size of the pictures. The miniature has no such phase: its pictures have one size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from spar_scale.phases import tokenizer_encoder

if TYPE_CHECKING:
    from spar_scale.config.recipe import Recipe
    from spar_scale.stages import Stage

PHASE = replace(
    tokenizer_encoder.PHASE,
    name="tokenizer_high_resolution",
    phase="high_resolution",
    trains="the same, on larger pictures",
    starts_from=("tokenizer_encoder",),
    evaluated_as=None,  # the evaluation scores the miniature, whose last phase of the tokenizer is `tokenizer_encoder`
)


def build(recipe: Recipe) -> Stage:
    """Build the phase as `tokenizer_encoder` does."""
    return tokenizer_encoder.build(recipe)
