"""Simulate one rank of a world of any size in one process: collectives do nothing, weights have no values.

torch's fake process group (from its testing package, 2.13) simulates hundreds of ranks in a second. The groups, tensor
cuts and shapes are those of the real run, on the meta device; only values are missing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn


@contextlib.contextmanager
def fake_world(size: int, rank: int) -> Iterator[dist.ProcessGroup]:
    """Be rank `rank` of `size` within the context. Raises RuntimeError if a process group exists already."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("a rank of a real world cannot simulate another")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def materialize(module: nn.Module) -> None:
    """Replace every parameter and buffer on the meta device by an uninitialised CPU tensor.

    Tensors that several modules share stay shared and keep their attributes; `to_empty` (torch 2.13) would split them.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}  # id -> (old, new); holds the old one, so that its id stays unique
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, old in table.items():
                if old is None or not old.is_meta:
                    continue
                if id(old) not in made:
                    new = torch.empty_like(old, device="cpu")
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, old.requires_grad)
                    vars(new).update(vars(old))
                    made[id(old)] = old, new
                table[name] = made[id(old)][1]  # pyright: ignore[reportArgumentType]
