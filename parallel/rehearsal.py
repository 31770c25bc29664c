"""One rank of a world that is not there: groups of any size whose collectives do nothing, weights without values.

torch's fake process group (of its testing package, 2.13) makes a world of hundreds in a second on one process, so a
layout's groups, cuts and shapes are those of the real run, on the meta device. What is not rehearsed is any value.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn


@contextlib.contextmanager
def fake_world(size: int, rank: int) -> Iterator[dist.ProcessGroup]:
    """Be rank `rank` of `size` within the context; raises RuntimeError where there is a real world already."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("a rank of a real world cannot rehearse another")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def give_memory(module: nn.Module) -> None:
    """Put every weight and buffer that is on the meta device into memory, without values.

    One that several modules share stays one, with what is noted on it; `to_empty` (torch 2.13) would make several.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}  # with the old one, so that no other takes its id
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
