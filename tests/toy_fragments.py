"""A small set of parameters under any layout, each element with a value that says where it belongs."""

from __future__ import annotations

import math
import zlib
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from parallel.checkpoint.boxes import Fragment, TensorCut

KINDS = ("model", "exp_avg", "exp_avg_sq", "ema")
SHAPES: dict[str, tuple[int, ...]] = {
    "block.weight": (6, 10),
    "block.bias": (10,),
    "conv": (4, 3, 3, 2),
    "scale": (),
    "gate": (8, 5),  # tensor parallel: two halves, each cut along dim 0 (as in a gated linear unit)
    "row": (5, 8),  # tensor parallel along dim 1
}
_CUT_DIM = {"gate": (0, 2), "row": (1, 1)}  # name -> (dim, interleaved parts)


def full(name: str, kind: str) -> Tensor:
    """Return the whole tensor: distinct whole numbers that fp32 holds exactly."""
    shape = SHAPES[name]
    base = 1000 * (zlib.crc32(f"{kind}.{name}".encode()) % 10_000)
    return (torch.arange(math.prod(shape), dtype=torch.float32) + base).view(shape)


def toy_fragments(
    rank: int, tensor: int, weights: tuple[int, ...], per_parameter: bool, filled: bool, kinds: tuple[str, ...] = KINDS
) -> list[Fragment]:
    """Fragments of `rank` where `tensor` ranks cut and `weights` says how unevenly the data ranks share.

    `per_parameter` shares out every parameter (as ZeRO-3) instead of one flat buffer (as ZeRO-1 and 2).
    """
    tensor_rank, data_rank = rank % tensor, rank // tensor
    locals_ = {name: _local(name, tensor, tensor_rank) for name in SHAPES}
    sizes = [math.prod(shape) for shape, _ in locals_.values()]
    starts = [0, *accumulate(sizes)]
    low, high = _range(sum(sizes), weights, data_rank)
    fragments = []
    for (name, (shape, cut)), begin, size in zip(locals_.items(), starts, sizes, strict=False):
        if per_parameter:
            first, last = _range(size, weights, data_rank)
        else:
            first, last = max(low - begin, 0), min(high - begin, size)
        if first >= last:
            continue
        views = {}
        for kind in kinds:
            buffer = torch.full((last - first + 6,), -1.0)  # the view lies inside a larger flat buffer
            views[kind] = buffer.narrow(0, 3, last - first)
            if filled:
                views[kind].copy_(expected(name, kind, cut)[first:last])
        fragments.append(Fragment(name, shape, first, views, cut, writes=cut is not None or tensor_rank == 0))
    return fragments


def expected(name: str, kind: str, cut: TensorCut | None) -> Tensor:
    """Return the flat local tensor under a cut."""
    whole = full(name, kind)
    if cut is None:
        return whole.reshape(-1)
    return torch.cat([whole.narrow(cut.dim, start, length) for start, length in cut.segments], cut.dim).reshape(-1)


def wrong_elements(fragments: list[Fragment], kinds: tuple[str, ...] = KINDS) -> list[str]:
    """Name the fragments whose content is not what belongs there."""
    wrong = []
    for fragment in fragments:
        for kind in kinds:
            right = expected(fragment.name, kind, fragment.cut)[fragment.start :][: fragment.tensors[kind].numel()]
            if not torch.equal(fragment.tensors[kind], right):
                wrong.append(f"{kind}.{fragment.name}")
    return wrong


def _local(name: str, tensor: int, tensor_rank: int) -> tuple[tuple[int, ...], TensorCut | None]:
    shape = SHAPES[name]
    if tensor == 1 or name not in _CUT_DIM:
        return shape, None
    dim, parts = _CUT_DIM[name]
    part = shape[dim] // parts
    length = part // tensor
    segments = tuple((index * part + tensor_rank * length, length) for index in range(parts))
    local = (*shape[:dim], length * parts, *shape[dim + 1 :])
    return local, TensorCut(dim, shape, segments)


def _range(size: int, weights: tuple[int, ...], index: int) -> tuple[int, int]:
    edges = [size * total // sum(weights) for total in (0, *accumulate(weights))]
    return list(pairwise(edges))[index]
