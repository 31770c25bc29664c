"""The only owner of process groups: tensor ranks are neighbours, then data, pipeline stages farthest apart.

A layout is refused with the nearest ones that fit before any group is made. Besides DeepSpeed's
grid there are two gloo groups over the whole world: one for checkpoint files, and one for small
agreements between hosts (metrics, signals), so neither waits behind the other or behind the GPUs.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from parallel.errors import UserError
from parallel.launch import MARGIN_S, silenced


@dataclass(frozen=True)
class Layout:
    """How one run is spread: tensor and pipeline sizes, ZeRO stage; data size follows from the world."""

    tensor: int = 1
    pipeline: int = 1
    zero: int = 1

    def data(self, world: int) -> int:
        """Number of data ranks in a world; raises UserError when the layout does not fit it."""
        if self.pipeline > 1 and self.zero > 1:
            raise UserError(
                f"parallel.zero: found {self.zero} with parallel.pipeline {self.pipeline}; a pipeline holds "
                "whole gradients and parameters, so it goes with zero 1"
            )
        size = self.tensor * self.pipeline
        if world % size:
            fits = [n for n in range(1, world + 1) if world % n == 0]
            raise UserError(
                f"parallel: tensor {self.tensor} x pipeline {self.pipeline} = {size} does not divide "
                f"{world} process(es); sizes that fit: {', '.join(map(str, fits))}"
            )
        return world // size


class Topology:
    """The process groups of a layout. Made once per process; engines of later phases reuse it."""

    def __init__(self, layout: Layout):
        from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology

        self.layout = layout
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.data_size = layout.data(self.world)
        self.axes: Any = PipeModelDataParallelTopology(
            num_pp=layout.pipeline, num_mp=layout.tensor, num_dp=self.data_size
        )
        with silenced():
            self.grid: Any = PipelineParallelGrid(topology=self.axes)
        self.data_rank: int = self.grid.get_data_parallel_rank()
        self.tensor_rank: int = self.grid.get_slice_parallel_rank()
        self.stage: int = self.grid.get_stage_id()
        self.tensor_group: dist.ProcessGroup = self.grid.get_slice_parallel_group()
        self.files_group = _gloo_group()
        self.agreement_group = _gloo_group()

    def limit_waits(self, timeout_s: float) -> None:
        """Let every group that there is now give up at this timeout: DeepSpeed makes its own without one."""
        timeout = datetime.timedelta(seconds=timeout_s + MARGIN_S)
        for group in distributed_c10d._world.pg_map:
            distributed_c10d._set_pg_timeout(timeout, group)

    @property
    def is_last_stage(self) -> bool:
        """Whether the losses arise on this rank."""
        return self.stage == self.layout.pipeline - 1

    @property
    def speaks(self) -> bool:
        """Whether this rank's metrics count: last pipeline stage, first tensor rank."""
        return self.is_last_stage and self.tensor_rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum a CPU tensor over all processes (gloo)."""
        total = values.clone()
        dist.all_reduce(total, group=self.agreement_group)
        return total

    def gather(self, value: Any) -> list[Any]:
        """Every process's (small, picklable) value, in rank order, on every process."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.agreement_group)
        return values


def _gloo_group() -> dist.ProcessGroup:
    rehearsed = dist.get_backend() == "fake"  # one rank of a world that is not there
    group = dist.new_group(backend="fake" if rehearsed else "gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group
