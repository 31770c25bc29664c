"""Select the attention backend of a recipe while its run lasts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from parallel.errors import UserError
from parallel.launch.world import device_type
from spar_scale.config.recipe import Recipe
from spar_scale.ops.attention import BackendRefused, use_backend

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@contextlib.contextmanager
def attention_of(recipe: Recipe) -> Iterator[None]:
    """Use the recipe's attention backend within the context. Raises UserError if it is missing or refuses the input."""
    entered = False
    try:
        with use_backend(recipe.attention, device_type(), _DTYPES[recipe.precision]):
            entered = True
            yield
    # A refusal on entering occurs on every rank; a later one only on ranks that hold the layer.
    except BackendRefused as error:
        raise UserError(f"attention: {error}", everywhere=not entered) from error
