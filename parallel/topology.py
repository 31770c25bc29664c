"""The process groups of a run. Tensor-parallel ranks are neighbours, then data-parallel ranks; pipeline stages are
farthest apart.

A layout that does not fit is refused before any group is created, with the nearest layouts that fit. Besides
DeepSpeed's grid there are two gloo groups over the whole world: one for checkpoint files and one for small messages
between hosts (metrics, signals), so that neither waits for the other or for the GPUs.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from parallel.errors import UserError
from parallel.launch.world import MARGIN_S, silenced

NEAREST = 2
"""Number of layouts that a refusal suggests."""


@dataclass(frozen=True)
class Layout:
    """Tensor- and pipeline-parallel sizes and ZeRO stage; the data-parallel size follows from the world size."""

    tensor: int = 1
    pipeline: int = 1
    zero: int = 1

    def data(self, world: int) -> int:
        """Return the data-parallel size for a world size. Raises UserError if the layout does not fit."""
        if self.pipeline > 1 and self.zero > 1:
            raise UserError(
                f"parallel.zero: found {self.zero} with parallel.pipeline {self.pipeline}; a pipeline needs unsharded "
                f"gradients and parameters; nearest that fit: parallel.pipeline={self.pipeline} parallel.zero=1 or "
                f"parallel.pipeline=1 parallel.zero={self.zero}"
            )
        size = self.tensor * self.pipeline
        if world % size:
            below, above = world // size * size, (world // size + 1) * size
            raise UserError(
                f"parallel: found tensor {self.tensor} x pipeline {self.pipeline} in a world of {world} process(es), "
                f"which must be a multiple of {size}; nearest that fit: {self._smaller(world, self.pipeline)}, or "
                f"{f'{below} or ' if below else ''}{above} processes"
            )
        return world // size

    def check_layers(self, num_layers: int, world: int) -> None:
        """Raise UserError if there are more pipeline stages than layers in the phase."""
        if self.pipeline > num_layers:
            raise UserError(
                f"parallel.pipeline: found {self.pipeline}, but this phase has {num_layers} layers, and every pipeline "
                f"stage needs at least one; nearest that fit {world} process(es): {self._smaller(world, num_layers)}",
                everywhere=True,
            )

    def _smaller(self, world: int, most_stages: int) -> str:
        """Return the largest smaller layouts that fit, as arguments of a command."""
        # Only divisors of this tensor-parallel size: they divide every size that this one divides, such as the heads.
        tensors = [size for size in range(1, self.tensor + 1) if self.tensor % size == 0]
        fits = [(t, p) for t in tensors for p in range(1, most_stages + 1) if world % (t * p) == 0]
        fits.sort(key=lambda sizes: (-sizes[0] * sizes[1], -sizes[0]))
        return " or ".join(f"parallel.tensor={t} parallel.pipeline={p}" for t, p in fits[:NEAREST])


class Topology:
    """The process groups of a layout. Created once per process; engines of later phases reuse them."""

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
        self.pipeline_stage: int = self.grid.get_stage_id()
        self.tensor_group: dist.ProcessGroup = self.grid.get_slice_parallel_group()
        self.files_group = _gloo_group()
        self.agreement_group = _gloo_group()

    def limit_waits(self, timeout_s: float) -> None:
        """Set the timeout of all existing groups, after the engine exists: DeepSpeed creates groups without one."""
        timeout = datetime.timedelta(seconds=timeout_s + MARGIN_S)
        for group in distributed_c10d._world.pg_map:
            distributed_c10d._set_pg_timeout(timeout, group)

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the last pipeline stage, which computes the losses."""
        return self.pipeline_stage == self.layout.pipeline - 1

    @property
    def reports_metrics(self) -> bool:
        """Whether this rank's metrics count: last pipeline stage, first tensor-parallel rank."""
        return self.is_last_stage and self.tensor_rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum a CPU tensor over all processes (gloo)."""
        total = values.clone()
        dist.all_reduce(total, group=self.agreement_group)
        return total

    def largest(self, value: int) -> int:
        """Return the maximum of a number over all processes, on every process."""
        if self.world == 1:
            return value
        maximum = torch.tensor(value)
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group=self.agreement_group)
        return int(maximum)

    def gather(self, value: Any) -> list[Any]:
        """Return the (small, picklable) values of all processes in rank order, on every process."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.agreement_group)
        return values


def _gloo_group() -> dist.ProcessGroup:
    is_fake = dist.get_backend() == "fake"  # see fake_world.py
    group = dist.new_group(backend="fake" if is_fake else "gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group
