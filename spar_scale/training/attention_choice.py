"""The recipe's `attention`, for as long as its run lasts."""

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
    """Compute attention by the backend that the recipe names; UserError where it is absent or reads no such input."""
    entered = False
    try:
        with use_backend(recipe.attention, device_type(), _DTYPES[recipe.precision]):
            entered = True
            yield
    except BackendRefused as error:  # on entering every process meets it, later only those that hold the layer
        raise UserError(f"attention: {error}", everywhere=not entered) from error
