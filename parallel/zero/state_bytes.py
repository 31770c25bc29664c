"""Calculate the bytes of weights, gradients, optimizer state and EMA on one rank.

The rules are those of DeepSpeed 0.19.8 under our configuration; a test compares them with real engines, to the byte.
ZeRO stages 1 and 2 store each optimizer group as one flat tensor, padded to a multiple of twice the data-parallel size,
and give each rank an equal part. ZeRO stage 3 divides each parameter separately. In bf16, ZeRO stage 1 is another class
(BF16_Optimizer), which keeps all gradients in fp32. In fp32, too, master weights are separate from the weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from parallel.optimizers import GroupState
from parallel.zero.config import PERSISTENT

FP32 = 4


@dataclass(frozen=True)
class Weight:
    """One parameter on a rank: its number of elements after a tensor cut, and its optimizer group (None: frozen)."""

    numel: int
    group: int | None


@dataclass(frozen=True)
class ZeroShape:
    """Everything that determines the layout of state: ZeRO stage, data-parallel size, precision, pipeline, optimizer.

    `states` is the optimizer's state by group, in the order of the groups. For groups in `whole_matrices`, a rank keeps
    the state of every matrix of which it holds a part.
    """

    zero: int
    data_size: int
    states: Sequence[GroupState]
    half: bool = False
    pipelined: bool = False
    whole_matrices: Collection[int] = ()


def state_bytes(weights: Sequence[Weight], num_groups: int, shape: ZeroShape, data_rank: int = 0) -> dict[str, int]:
    """Return the bytes by kind on one data rank: `weights` (trained), `frozen`, `gradients`, `optimizer`, `ema`.

    `weights` are in the model's order. Gradients are those after the backward pass of a micro-batch that is not the
    last one of its step.
    """
    groups = {
        index: [weight.numel for weight in weights if weight.group == index] + [1] * shape.pipelined
        for index in range(num_groups)
    }
    groups = {index: numels for index, numels in groups.items() if numels}
    frozen = [weight.numel for weight in weights if weight.group is None]
    make = _zero_3 if shape.zero == 3 else _zero_12
    return make(groups, frozen, shape, data_rank)


def largest_state_bytes(weights: Sequence[Weight], num_groups: int, shape: ZeroShape) -> dict[str, int]:
    """Return the `state_bytes` of the data-parallel rank with the largest sum."""
    uneven = shape.whole_matrices or (shape.zero == 2 and not shape.half)
    ranks = range(shape.data_size if uneven else 1)
    return max((state_bytes(weights, num_groups, shape, rank) for rank in ranks), key=lambda kinds: sum(kinds.values()))


def _zero_12(groups: dict[int, list[int]], frozen: list[int], shape: ZeroShape, data_rank: int) -> dict[str, int]:
    item, step = 2 if shape.half else FP32, 2 * shape.data_size  # bytes of a weight, elements of the padding unit
    flat = {index: -(-sum(numels) // step) * step for index, numels in groups.items()}
    part = {index: length // shape.data_size for index, length in flat.items()}
    whole = {index: _overlapping(numels, data_rank * part[index], part[index]) for index, numels in groups.items()}
    trained = sum(map(sum, groups.values())) - len(groups) * shape.pipelined  # a dummy never has a gradient
    if shape.zero == 1:
        gradients = trained * item + (sum(flat.values()) * FP32 if shape.half else 0)
    else:
        gradients = sum((part if shape.half else whole).values()) * FP32
    kept = {index: whole[index] if index in shape.whole_matrices else part[index] for index in groups}
    return {
        "weights": sum(flat.values()) * item,
        "frozen": sum(frozen) * item,
        "gradients": gradients,
        "optimizer": sum(part.values()) * FP32 + _optimizer_bytes(kept, shape),
        "ema": sum(part.values()) * FP32,
    }


def _zero_3(groups: dict[int, list[int]], frozen: list[int], shape: ZeroShape, data_rank: int) -> dict[str, int]:
    item = 2 if shape.half else FP32
    part = {index: sum(_share(numel, shape) for numel in numels) for index, numels in groups.items()}
    trained = list(itertools.chain.from_iterable(groups.values()))
    return {
        "weights": (sum(part.values()) + _persistent(trained)) * item,
        "frozen": (sum(_share(numel, shape) for numel in frozen) + _persistent(frozen)) * item,
        "gradients": sum(part.values()) * FP32,
        "optimizer": sum(part.values()) * FP32 + _optimizer_bytes(part, shape),
        "ema": sum(part.values()) * FP32,
    }


def _share(numel: int, shape: ZeroShape) -> int:
    return -(-numel // shape.data_size)


def _persistent(numels: list[int]) -> int:
    return sum(numel for numel in numels if numel <= PERSISTENT)


def _optimizer_bytes(kept: Mapping[int, int], shape: ZeroShape) -> int:
    """Return the bytes of the optimizer's tensors and scalars; `kept` maps a group to its number of elements."""
    states = {index: shape.states[index] for index in kept}
    return sum(numel * FP32 * len(states[index].tensors) + states[index].scalar_bytes for index, numel in kept.items())


def _overlapping(numels: list[int], start: int, length: int) -> int:
    """Return the total elements of all parameters that overlap the range [start, start + length) of the flat group."""
    total = position = 0
    for numel in numels:
        if position < start + length and position + numel > start:
            total += numel
        position += numel
    return total
