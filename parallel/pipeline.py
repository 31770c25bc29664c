"""The list of layers cut into consecutive DeepSpeed pipeline stages of nearly equal cost.

Every layer becomes a function from tuple to tuple over the slots that are live at its edges, so a
cut may fall anywhere; it falls where the costliest stage is cheapest, since all others wait for it.
Memory is not weighed. Pipelines run under ZeRO-1.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parallel.costs import balanced_cut
from parallel.errors import UserError
from parallel.launch.world import silenced
from parallel.program import Layer, Program, live_slots, pack, repeat_derived, run_layer, unpack
from parallel.topology import Topology

log = logging.getLogger(__name__)


class TupleLayer(nn.Module):
    """One layer between two edges: unpack the slots before it, run it, pack those still read later."""

    def __init__(self, layer: Layer, before: Sequence[str], after: Sequence[str], recompute: bool):
        super().__init__()
        self.layer, self.before, self.after, self.recompute = layer, tuple(before), tuple(after), recompute

    def forward(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Packed slots in, packed slots out."""
        live = unpack(tensors, self.before)
        return pack(run_layer(self.layer, live, self.after, self.recompute), self.after)


class StackTerms(nn.Module):
    """The end of the list: the terms stacked as (B, T), fp32."""

    def __init__(self, edge: Sequence[str], terms: Sequence[str]):
        super().__init__()
        self.edge, self.terms = tuple(edge), tuple(terms)

    def forward(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """Unpack the last edge and stack."""
        live = unpack(tensors, self.edge)
        return torch.stack([live[name].float() for name in self.terms], dim=1)


def pipeline_module(
    program: Program,
    topology: Topology,
    loss: Callable[[Tensor, Tensor], Tensor],
    groups: int,
    costs: Sequence[float],
) -> Any:
    """Cut a program into DeepSpeed stages, balanced by the `costs` of its layers.

    `loss` maps (terms (B, T), weight (B,)) to the scalar of one micro-batch. Each stage gets one
    unused 1-d parameter per learning-rate group (`dummies`): DeepSpeed 0.19.8 hangs when stages own
    different sets of groups and refuses a stage without trainable parameters. Raises UserError where
    there are more stages than layers.
    """
    from deepspeed.pipe import PipelineModule

    bounds = stage_bounds(costs, topology.layout.pipeline)
    log.info("pipeline cut by counted operations: %s", describe(bounds, costs))
    listed, starts = repeat_derived(list(program.layers), bounds, program.inputs, program.terms)  # type: ignore[arg-type]
    edges = live_slots(listed, program.inputs, program.terms)

    class Balanced(PipelineModule):
        """DeepSpeed's, cut where we say."""

        def _partition_layers(self, method: str = "") -> None:
            self.parts = [*starts[:-1], len(listed) + 1]  # the last stage also stacks the terms
            self._set_bounds(start=self.parts[topology.stage], stop=self.parts[topology.stage + 1])

    layers: list[nn.Module] = [
        TupleLayer(layer, before, after, program.recompute)
        for layer, before, after in zip(listed, edges, edges[1:], strict=False)
    ]
    layers.append(StackTerms(edges[-1], program.terms))
    with silenced():
        module: Any = Balanced(
            layers=layers,
            topology=topology.axes,
            loss_fn=loss,
            activation_checkpoint_interval=0,
            dynamic_shape=True,
        )
    module.dummies = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(groups)])
    return module


def stage_bounds(costs: Sequence[float], stages: int) -> list[int]:
    """Number of the first layer of each stage, and of all layers; UserError where a stage would have none."""
    if stages > len(costs):
        raise UserError(
            f"parallel.pipeline: found {stages}; this phase is a list of {len(costs)} layers, and each stage needs"
            f" one: parallel.pipeline={len(costs)} is the most"
        )
    return balanced_cut(costs, stages)


def describe(bounds: Sequence[int], costs: Sequence[float]) -> str:
    """The layers of each stage and its share of the whole cost."""
    whole = sum(costs) or 1
    spans = itertools.pairwise(bounds)
    return ", ".join(f"layers {a}-{b - 1} ({sum(costs[a:b]) / whole:.0%})" for a, b in spans)


def receive_into_new_buffers(engine: Any, device: torch.device) -> None:
    """Have a DeepSpeed pipeline engine receive every tensor into a buffer of its own dtype.

    DeepSpeed 0.19.8 keeps one buffer for each place of a tuple, whatever the dtype: a stage in the middle, which
    receives slots and gradients in turn, then expects bytes of one for the other. Remove when the canary in
    tests/unit/test_pipeline.py fails.
    """
    engine._allocate_or_extend_buffers = lambda _, shape, dtype: torch.empty(shape, dtype=dtype, device=device)


def pipeline_batches(
    batches: Iterator[Mapping[str, Any]], inputs: Sequence[str], device: torch.device
) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """Micro-batches as DeepSpeed's pipeline takes them: (packed input slots, weight)."""
    for batch in batches:
        slots = {name: batch[name].to(device, non_blocking=True) for name in inputs}
        yield pack(slots, inputs), batch["weight"].to(device, non_blocking=True)
