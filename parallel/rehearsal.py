"""One rank of a world that is not there: process groups of any size whose collectives do nothing.

torch's fake process group (of its testing package, 2.13) makes a world of hundreds in a second on one process, so a
layout's groups, cuts and shapes are those of the real run, on the meta device. What is not rehearsed is any value.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist


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
