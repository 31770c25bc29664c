"""L_s: keeps the features of the vision encoder close to the initial ones while it learns to preserve pixels."""

from __future__ import annotations

from torch import Tensor

from spar_scale.objectives.reconstruction import mean_squared_error


def semantic_distillation(features: Tensor, initial_features: Tensor) -> Tensor:
    """Return L_s = MSE(f_v, f_v') of each sample, (B, N, D) twice to (B,) in fp32 (SPAR, tokenizer stage III).

    The features are those after the projector, which the language model reads. The initial ones get no gradient.
    """
    return mean_squared_error(features, initial_features.detach())
