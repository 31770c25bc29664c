"""Count the bytes of an engine's tensors, to compare them with the calculation in `state_bytes.py`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from parallel.zero.engine import Engine


def kept_bytes(engine: Engine) -> dict[str, int]:
    """Return the bytes by kind as `state_bytes` does, except gradients, which exist only during a step.

    Uses private attributes of DeepSpeed (0.19.8).
    """
    wrapped: Any = engine.deepspeed.optimizer
    parameters = list(engine.deepspeed.module.parameters())
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    if engine.zero == 3:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        weights = [wrapped.lp_param_buffer, *(parameter.data for parameter in trained)]
        frozen += [parameter.ds_tensor for parameter in frozen]  # pyright: ignore[reportAttributeAccessIssue]
        flats = wrapped.fp32_partitioned_groups_flat
        masters = [flat for flat in flats if not _same_storage(flat, wrapped.lp_param_buffer)]
    else:
        weights = getattr(wrapped, "bf16_groups_flat", None) or wrapped.bit16_groups_flat
        masters = [flat for group in wrapped.optimizer.param_groups for flat in group["params"]]
    states = list(wrapped.optimizer.state.values())
    moments = [v for state in states for kind, v in state.items() if torch.is_tensor(v) and kind != "ema"]
    return {
        "weights": _size(weights),
        "frozen": _size(frozen),
        "optimizer": _size([*masters, *moments]),
        "ema": _size(state["ema"] for state in states),
    }


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
