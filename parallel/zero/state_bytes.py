"""The bytes that the engine keeps for a rank's weights, by arithmetic alone.

The rules are those of DeepSpeed 0.19.8 under our configuration, and a test holds them, to the byte, to engines that
run. ZeRO 1 and 2 lay each optimizer group out flat, padded to twice the data ranks, and give each rank an equal part;
ZeRO 3 cuts each parameter by itself. In bf16 ZeRO 1 is another class (BF16_Optimizer), which keeps all gradients in
fp32. Masters stand beside the weights in fp32 too.
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
    """One parameter as a rank holds it: its elements, after any tensor cut, and its optimizer group (None: frozen)."""

    numel: int
    group: int | None


@dataclass(frozen=True)
class ZeroShape:
    """What decides how state is laid out: ZeRO stage, data ranks, precision, pipeline, and the optimizer's state.

    `states` is the optimizer's state by group, in the groups' order; those in `whole_matrices` keep it for every
    matrix of which they hold a part.
    """

    zero: int
    data_size: int
    states: Sequence[GroupState]
    half: bool = False
    pipelined: bool = False
    whole_matrices: Collection[int] = ()


def state_bytes(weights: Sequence[Weight], num_groups: int, shape: ZeroShape, data_rank: int = 0) -> dict[str, int]:
    """Bytes by kind on one data rank: `weights` (trained), `frozen`, `gradients`, `optimizer`, `ema`.

    `weights` are in the model's order. Gradients are those at the end of a micro-batch's backward pass that is not
    the last one of its step.
    """
    groups = {
        index: [weight.numel for weight in weights if weight.group == index] + [1] * shape.pipelined
        for index in range(num_groups)
    }
    groups = {index: numels for index, numels in groups.items() if numels}
    frozen = [weight.numel for weight in weights if weight.group is None]
    make = _zero_3 if shape.zero == 3 else _zero_12
    return make(groups, frozen, shape, data_rank)


def fullest(weights: Sequence[Weight], num_groups: int, shape: ZeroShape) -> dict[str, int]:
    """`state_bytes` of the data rank that keeps most."""
    uneven = shape.whole_matrices or (shape.zero == 2 and not shape.half)
    ranks = range(shape.data_size if uneven else 1)
    return max((state_bytes(weights, num_groups, shape, rank) for rank in ranks), key=lambda found: sum(found.values()))


def _zero_12(groups: dict[int, list[int]], frozen: list[int], shape: ZeroShape, data_rank: int) -> dict[str, int]:
    item, step = 2 if shape.half else FP32, 2 * shape.data_size
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
    """Bytes of the optimizer's tensors and scalars, for groups that keep them for so many weights."""
    states = {index: shape.states[index] for index in kept}
    return sum(numel * FP32 * len(states[index].tensors) + states[index].scalar_bytes for index, numel in kept.items())


def _overlapping(numels: list[int], start: int, length: int) -> int:
    """Elements of the parameters, each whole, of which some lie in the flat group's part from `start` on."""
    found = position = 0
    for numel in numels:
        if position < start + length and position + numel > start:
            found += numel
        position += numel
    return found
