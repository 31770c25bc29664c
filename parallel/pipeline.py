"""The list of layers cut into consecutive DeepSpeed pipeline stages.

Every layer becomes a function from tuple to tuple over the slots that are live at its edges, so a
cut may fall anywhere. Pipelines run under ZeRO-1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parallel.launch import silenced
from parallel.program import Layer, Program, pack, run_layer, unpack
from parallel.topology import Topology


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


def pipeline_module(program: Program, topology: Topology, loss: Callable[[Tensor, Tensor], Tensor], groups: int) -> Any:
    """Cut a program into DeepSpeed stages.

    `loss` maps (terms (B, T), weight (B,)) to the scalar of one micro-batch. Each stage gets one
    unused 1-d parameter per learning-rate group (`dummies`): DeepSpeed 0.19.8 hangs when stages own
    different sets of groups and refuses a stage without trainable parameters.
    """
    from deepspeed.pipe import PipelineModule

    edges = program.boundaries
    layers: list[nn.Module] = [
        TupleLayer(layer, before, after, program.recompute)  # type: ignore[arg-type]
        for layer, before, after in zip(program.layers, edges, edges[1:], strict=False)
    ]
    layers.append(StackTerms(edges[-1], program.terms))
    with silenced():
        module = PipelineModule(
            layers=layers,
            topology=topology.axes,
            loss_fn=loss,
            partition_method="uniform",
            activation_checkpoint_interval=0,
            dynamic_shape=True,
        )
    module.dummies = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(groups)])
    return module


def pipeline_batches(
    batches: Iterator[Mapping[str, Any]], inputs: Sequence[str], device: torch.device
) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """Micro-batches as DeepSpeed's pipeline takes them: (packed input slots, weight)."""
    for batch in batches:
        slots = {name: batch[name].to(device, non_blocking=True) for name in inputs}
        yield pack(slots, inputs), batch["weight"].to(device, non_blocking=True)
