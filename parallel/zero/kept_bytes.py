"""The bytes that an engine keeps for a rank's weights, counted on its tensors: what `state_bytes.py` foretells."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from parallel.zero.engine import Engine


def kept_bytes(engine: Engine) -> dict[str, int]:
    """Bytes by kind as `state_bytes` names them, but for gradients, which there are within a step alone.

    Reads what DeepSpeed (0.19.8) holds. Moments and average are there once the optimizer has been asked for them.
    """
    wrapped: Any = engine.deepspeed.optimizer
    parameters = list(engine.deepspeed.module.parameters())
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    if engine.zero == 3:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        weights = [wrapped.lp_param_buffer, *(parameter.data for parameter in trained)]
        frozen += [parameter.ds_tensor for parameter in frozen]  # pyright: ignore[reportAttributeAccessIssue]
        masters = [flat for flat in wrapped.fp32_partitioned_groups_flat if not _share(flat, wrapped.lp_param_buffer)]
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


def _share(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
