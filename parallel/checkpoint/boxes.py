"""Describe the flat ranges that a rank owns as boxes of the global tensors, independently of the layout.

An engine keeps a flat range of a parameter, or of its tensor-parallel slice. A row-major flat range is a union of few
N-d boxes (at most 2*ndim - 1), and a box shifted along the cut dimension is a chunk of the global tensor in the sense
of torch.distributed.checkpoint. The boxes are views: saving gathers nothing, loading writes in place, and a file does
not depend on ranks, ZeRO stages or cuts.

Uses the `__create_write_items__` / `__create_chunk_list__` protocol of torch.distributed.checkpoint
(private in torch 2.13; `tests/unit/test_boxes.py` fails when it changes).
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from parallel.errors import UserError

Box = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class TensorCut:
    """The position of a tensor-parallel slice: its dimension `dim` consists of these (global offset, length) runs."""

    dim: int
    global_shape: tuple[int, ...]
    segments: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Fragment:
    """The flat range of one parameter that this rank holds.

    `shape` is that of the tensor-parallel local tensor, `start` the offset of the range in it. `tensors` maps a kind
    ("model" for fp32 master weights, "exp_avg", "exp_avg_sq", "momentum_buffer", "ema") to a writable 1-D view.
    `writes` is true on the one rank that saves this range; every rank that has the fragment loads it.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    tensors: dict[str, Tensor]
    cut: TensorCut | None
    writes: bool

    @property
    def global_shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        return self.shape if self.cut is None else tuple(self.cut.global_shape)


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Cut the flat range [start, stop) of a row-major tensor into few (offset, size) boxes, in flat order."""
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    (first, head), (last, tail) = divmod(start, row), divmod(stop, row)
    if first == last:
        yield from _inside(shape, first, head, tail)
        return
    if head:
        yield from _inside(shape, first, head, row)
        first += 1
    if last > first:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if tail:
        yield from _inside(shape, last, 0, tail)


def _inside(shape: tuple[int, ...], index: int, start: int, stop: int) -> Iterator[Box]:
    for offset, size in boxes(shape[1:], start, stop):
        yield (index, *offset), (1, *size)


class GlobalTensor:
    """This rank's pieces of one global tensor, in a form that torch.distributed.checkpoint saves and loads in place."""

    def __init__(self, shape: Iterable[int]) -> None:
        """Start without pieces; `shape` is the global one."""
        self.shape = torch.Size(shape)
        self.pieces: dict[torch.Size, Tensor] = {}

    def add(self, fragment: Fragment, kind: str) -> None:
        """Add the boxes of one kind of a fragment. Raises ValueError if the range is outside the shape."""
        flat = fragment.tensors[kind]
        stop = fragment.start + flat.numel()
        if flat.dim() != 1 or fragment.start < 0 or stop > math.prod(fragment.shape):
            raise ValueError(f"{kind}.{fragment.name}: range [{fragment.start}, {stop}) is not in {fragment.shape}")
        position = 0
        for offset, size in boxes(tuple(fragment.shape), fragment.start, stop):
            count = math.prod(size)
            self._place(offset, flat.narrow(0, position, count).view(size), fragment.cut)
            position += count

    def _place(self, offset: tuple[int, ...], view: Tensor, cut: TensorCut | None) -> None:
        if cut is None:
            self._put(offset, view)
            return
        low, high = offset[cut.dim], offset[cut.dim] + view.shape[cut.dim]
        local = 0  # offset of the segment in the local tensor
        for start, length in cut.segments:
            first, last = max(low, local), min(high, local + length)
            if first < last:
                moved = (*offset[: cut.dim], start + first - local, *offset[cut.dim + 1 :])
                self._put(moved, view.narrow(cut.dim, first - low, last - first))
            local += length

    def _put(self, offset: tuple[int, ...], view: Tensor) -> None:
        place = torch.Size(offset)
        if place in self.pieces:
            raise ValueError(f"two pieces at offset {tuple(offset)} of a tensor of shape {tuple(self.shape)}")
        self.pieces[place] = view

    def size(self) -> torch.Size:
        """Return the shape of the global tensor; DCP calls this method."""
        return self.shape

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """Return the chunks to fill when loading."""
        return [ChunkStorageMetadata(offsets=offset, sizes=view.shape) for offset, view in self.pieces.items()]

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        """Return the chunks to write when saving."""
        return [
            WriteItem(
                index=MetadataIndex(name, offset),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets=offset, sizes=view.shape),
                    properties=TensorProperties(dtype=view.dtype),
                    size=self.shape,
                ),
            )
            for offset, view in self.pieces.items()
        ]


def whole(tensor: Tensor) -> GlobalTensor:
    """Return an ordinary tensor as a GlobalTensor of one piece."""
    leaf = GlobalTensor(tensor.shape)
    if tensor.numel():
        leaf.pieces[torch.Size([0] * tensor.dim())] = tensor.detach()
    return leaf


class BoxSavePlanner(DefaultSavePlanner):
    """Saves the pieces of `GlobalTensor` leaves; refuses a plan that leaves a gap or writes an element twice."""

    def __init__(self) -> None:
        """Take a flat dictionary of leaves as it is."""
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Check that every element is written exactly once.

        DCP (torch 2.13) does not: it silently drops identical chunks, and does not check a single rank.
        """
        seen: set[MetadataIndex] = set()
        volumes: dict[str, int] = {}
        sizes: dict[str, torch.Size] = {}
        for item in (item for plan in all_plans for item in plan.items):
            data = item.tensor_data
            if item.index in seen or data is None or data.chunk is None:
                raise ValueError(f"{item.index.fqn}: offset {item.index.offset} is written twice")
            if sizes.setdefault(item.index.fqn, data.size) != data.size:
                raise ValueError(
                    f"{item.index.fqn}: ranks disagree on its shape ({sizes[item.index.fqn]}, {data.size})"
                )
            seen.add(item.index)
            volumes[item.index.fqn] = volumes.get(item.index.fqn, 0) + math.prod(data.chunk.sizes)
        for name, volume in volumes.items():
            if volume != math.prod(sizes[name]):
                raise ValueError(f"{name}: {volume} of {math.prod(sizes[name])} elements are written")
        return super().create_global_plan(all_plans)

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Return the view to be written."""
        return self.state_dict[index.fqn].pieces[index.offset]


class BoxLoadPlanner(DefaultLoadPlanner):
    """Loads into the views of `GlobalTensor` leaves; refuses everything except tensors."""

    def __init__(self) -> None:
        """Take a flat dictionary of leaves as it is."""
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Keep the leaves themselves: the default (torch 2.13) deep-copies types that it does not know."""
        self.original_state_dict = self.state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Return the view to be filled."""
        return self.state_dict[index.fqn].pieces[index.offset]

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Refuse entries that are not tensors, because they would be unpickled."""
        raise UserError(f"{read_item.dest_index.fqn}: not a tensor; a checkpoint may hold only tensors")


def leaves(
    fragments: Iterable[Fragment],
    tensors: dict[str, Tensor],
    saving: bool,
    kinds: dict[str, str] | None = None,
) -> dict[str, GlobalTensor]:
    """Group views by key in the files: `{kind}.{name}` for fragments, the given name for whole tensors.

    When saving, fragments that another rank writes are skipped. `kinds` maps kinds of fragments to kinds in the files
    and skips kinds that it does not contain; if several kinds of a fragment map to one, the first is used.
    """
    grouped: dict[str, GlobalTensor] = {}
    for fragment in fragments:
        if saving and not fragment.writes:
            continue
        taken: set[str] = set()
        for kind in fragment.tensors:
            stored = kind if kinds is None else kinds.get(kind)
            if stored is None or stored in taken:
                continue
            taken.add(stored)
            leaf = grouped.setdefault(f"{stored}.{fragment.name}", GlobalTensor(fragment.global_shape))
            leaf.add(fragment, kind)
    for name, tensor in tensors.items():
        if name in grouped:
            raise ValueError(f"{name}: both a fragment and a whole tensor")
        grouped[name] = whole(tensor)
    return {key: leaf for key, leaf in grouped.items() if leaf.pieces}
