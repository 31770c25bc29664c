"""Estimate the costs of a layout before it is launched: memory by kind, traffic by link, time of a step.

Memory of weights, gradients, optimizer and EMA is exactly what the engine allocates, to the byte. Activations are what
autograd saves for the micro-batches in flight. A share of the memory stays free for what is not counted: CUDA itself,
allocator fragmentation, temporary results. Times depend on the assumptions in `ASSUMPTIONS`, so they are better for
comparing layouts than for predicting the duration of one.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from parallel.costs import LayerCost, activation_bytes
from parallel.optimizers import GroupState
from parallel.pipeline import stage_bounds
from parallel.topology import Layout
from parallel.zero.config import BUCKET
from parallel.zero.state_bytes import Weight, ZeroShape, largest_state_bytes

EFFICIENCY, LINK_EFFICIENCY, FREE_SHARE = 0.4, 0.7, 0.08
ASSUMPTIONS = (
    f"matrix products run at {EFFICIENCY:.0%} of the GPU's published dense peak, everything else takes no time",
    f"collectives are rings, reach {LINK_EFFICIENCY:.0%} of a link's published bandwidth and overlap with nothing",
    "nodes of 8 GPUs; tensor-parallel ranks are neighbours, then data-parallel ranks; pipeline stages farthest apart",
    f"{FREE_SHARE:.0%} of the memory stays free for CUDA, fragmentation and temporary results",
)


@dataclass(frozen=True)
class Machine:
    """Published figures of a GPU: memory, operations per second, one-way bandwidth within a node and between nodes."""

    name: str
    memory_bytes: float
    half_flops_per_s: float
    single_flops_per_s: float
    node_bytes_per_s: float
    network_bytes_per_s: float
    gpus_per_node: int = 8


@dataclass(frozen=True)
class CountedProgram:
    """The counts of a program under one tensor-parallel size, on one rank, for one micro-batch.

    `parameter_names` are the names of each layer's parameters, `weights` all parameters in the model's order, `states`
    the optimizer's state by group, `beside_bytes` those of the modules beside each layer, with their optimizers.
    """

    parameter_names: Sequence[Collection[str]]
    weights: Mapping[str, Weight]
    costs: Sequence[LayerCost]
    num_groups: int
    states: Sequence[GroupState]
    whole_matrices: Collection[int] = ()
    beside_bytes: Sequence[int] = ()

    def zero_shape(self, layout: Layout, data_size: int, half: bool) -> ZeroShape:
        """Return the parameters that determine how the engine lays out its state."""
        return ZeroShape(layout.zero, data_size, self.states, half, layout.pipeline > 1, self.whole_matrices)

    def stage_weights(self, first: int, end: int) -> list[Weight]:
        """Return the parameters of layers `first` to `end` - 1, each once."""
        names = set().union(*self.parameter_names[first:end])
        return [weight for name, weight in self.weights.items() if name in names]


@dataclass(frozen=True)
class Work:
    """The size of an optimizer step: samples, samples per micro-batch, and whether weights and products are bf16."""

    global_batch: int
    micro_batch: int
    half: bool


@dataclass
class LayoutEstimate:
    """The costs of a layout on its fullest GPU and its slowest pipeline stage; `refused` is why it cannot run."""

    layout: Layout
    data_size: int
    refused: str | None = None
    bounds: list[int] = field(default_factory=list)
    micro_steps: int = 0
    memory: dict[str, int] = field(default_factory=dict)
    traffic: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    bubble: float = 0.0
    padding: float = 0.0

    @property
    def step_s(self) -> float:
        """Expected seconds of a step."""
        return sum(self.seconds.values())

    @property
    def memory_bytes(self) -> int:
        """Bytes on the fullest GPU."""
        return sum(self.memory.values())


def estimate_layout(
    counted: CountedProgram, layout: Layout, data_size: int, micro_steps: int, work: Work, machine: Machine
) -> LayoutEstimate:
    """Estimate one valid layout. Raises UserError if it has more pipeline stages than layers."""
    bounds = stage_bounds([cost.flops for cost in counted.costs], layout.pipeline)
    shape = counted.zero_shape(layout, data_size, work.half)
    stages = [_PipelineStage(counted, a, b) for a, b in itertools.pairwise(bounds)]
    memories = [_memory(stage, number, len(stages), micro_steps, shape) for number, stage in enumerate(stages)]
    estimate = LayoutEstimate(layout, data_size, None, bounds, micro_steps)
    estimate.memory = max(memories, key=lambda memory: sum(memory.values()))
    estimate.bubble = (layout.pipeline - 1) / (micro_steps + layout.pipeline - 1)
    estimate.padding = 1 - work.global_batch / (micro_steps * work.micro_batch * data_size)
    estimate.traffic = _traffic(stages, layout, shape, micro_steps)
    estimate.seconds = _seconds(stages, estimate, work, machine)
    if (limit := machine.memory_bytes * (1 - FREE_SHARE)) < estimate.memory_bytes:
        needed = f"{estimate.memory_bytes / 2**30:.1f} of {limit / 2**30:.1f} GiB"
        largest = max(estimate.memory, key=lambda kind: estimate.memory[kind])
        estimate.refused = f"does not fit: {needed}, most of it {largest}"
    return estimate


class _PipelineStage:
    """The layers of one pipeline stage."""

    def __init__(self, counted: CountedProgram, first: int, end: int):
        self.costs, self.num_groups = counted.costs[first:end], counted.num_groups
        self.weights = counted.stage_weights(first, end)
        before = counted.costs[first - 1] if first else None
        self.received = before.sent_bytes if before else 0
        self.crossing = (before.sent_bytes + before.returned_bytes) if before else 0
        self.flops = sum(cost.flops for cost in self.costs)
        self.reduced = sum(cost.reduced_bytes for cost in self.costs)
        self.trained = sum(weight.numel for weight in self.weights if weight.group is not None)
        self.all = sum(weight.numel for weight in self.weights)
        self.beside = sum(counted.beside_bytes[first:end])


def _memory(stage: _PipelineStage, number: int, stages: int, micro_steps: int, shape: ZeroShape) -> dict[str, int]:
    """Return the bytes by kind of one pipeline stage.

    It keeps the activations of all micro-batches that later pipeline stages have not sent back yet.
    """
    item, in_flight = 2 if shape.half else 4, min(stages - number, micro_steps)
    kinds = largest_state_bytes(stage.weights, stage.num_groups, shape)
    kinds["activations"] = in_flight * (activation_bytes(stage.costs) + stage.received)
    if stage.beside:
        kinds["companions"] = stage.beside
    kinds["buckets"] = BUCKET * 4
    if shape.zero == 3:  # also holds gathered weights
        kinds["buckets"] += min(stage.all, 2 * BUCKET) * item
    return kinds


def _traffic(stages: list[_PipelineStage], layout: Layout, shape: ZeroShape, micro_steps: int) -> dict[str, int]:
    """Return the bytes that the busiest GPU sends in a step: in its tensor group, data group, and pipeline."""
    item, ring = 2 if shape.half else 4, (shape.data_size - 1) / shape.data_size
    tensor_ring = 2 * (layout.tensor - 1) / layout.tensor
    trained, everything = (max(getattr(stage, kind) for stage in stages) for kind in ("trained", "all"))
    # fp32 gradients have 4 bytes. ZeRO 1 reduces them once per step (in bf16 as an all-reduce) and gathers the weights.
    if shape.zero == 3:  # per micro-batch: weights for the forward and the backward pass, and gradients
        data = micro_steps * (2 * everything * item + trained * 4)
    elif shape.zero == 2:
        data = micro_steps * trained * 4 + trained * item
    else:
        data = trained * 4 * (2 if shape.half else 1) + trained * item
    return {
        "tensor": int(micro_steps * max(stage.reduced for stage in stages) * tensor_ring),
        "data": int(data * ring),
        "pipeline": micro_steps * max(stage.crossing for stage in stages),
    }


def _seconds(stages: list[_PipelineStage], estimate: LayoutEstimate, work: Work, machine: Machine) -> dict[str, float]:
    """Return the seconds of a step by activity; the slowest pipeline stage determines them."""
    layout, peak = estimate.layout, machine.half_flops_per_s if work.half else machine.single_flops_per_s
    node, network = (LINK_EFFICIENCY * rate for rate in (machine.node_bytes_per_s, machine.network_bytes_per_s))

    def link(span: int) -> float:
        """Return the rate between ranks of a group that spans this many consecutive ranks."""
        return node if span <= machine.gpus_per_node else network

    span = layout.tensor * estimate.data_size
    compute = estimate.micro_steps * max(stage.flops for stage in stages) / (peak * EFFICIENCY)
    seconds = {
        "compute": compute,
        "tensor": estimate.traffic["tensor"] / link(layout.tensor),
        "data": estimate.traffic["data"] / link(span),
        "pipeline": estimate.traffic["pipeline"] / link(span * layout.pipeline),
    }
    busy = seconds["compute"] + seconds["tensor"] + seconds["pipeline"]
    seconds["bubble"] = busy * (layout.pipeline - 1) / estimate.micro_steps
    return seconds
