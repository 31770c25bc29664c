"""What a layout will cost before it is launched: memory by kind, traffic by link, time of a step.

Memory for weights, gradients, optimizer and EMA is what the engine will allocate, to the byte; activations are what
autograd will keep for the micro-batches in flight. A GPU must also hold what is not counted (CUDA itself, the
fragments of the allocator, passing results of a forward without gradient), for which a share is left free. Times rest
on assumptions that `ASSUMPTIONS` names, so they rank layouts better than they predict one.
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
from parallel.zero.state_bytes import Weight, ZeroShape, fullest

EFFICIENCY, LINK_EFFICIENCY, FREE_SHARE = 0.4, 0.7, 0.08
ASSUMPTIONS = (
    f"matrix products run at {EFFICIENCY:.0%} of the GPU's published dense peak, everything else takes no time",
    f"collectives reach {LINK_EFFICIENCY:.0%} of a link's published bandwidth, as rings, and overlap with nothing",
    "nodes of 8 GPUs; ranks of a tensor group are neighbours, then data ranks, pipeline stages farthest apart",
    f"{FREE_SHARE:.0%} of the memory is left free for CUDA, fragments and passing results",
)


@dataclass(frozen=True)
class Machine:
    """A GPU by its published figures: bytes, operations a second, bytes a second one way within its node, and out."""

    name: str
    memory_bytes: float
    half_flops_per_s: float
    single_flops_per_s: float
    node_bytes_per_s: float
    network_bytes_per_s: float
    gpus_per_node: int = 8


@dataclass(frozen=True)
class Counted:
    """A program under one tensor size: what each layer holds and costs on one rank, for one micro-batch.

    `held` are the names of each layer's parameters, `weights` all parameters in the model's order, `states` the
    optimizer's state by group.
    """

    held: Sequence[Collection[str]]
    weights: Mapping[str, Weight]
    costs: Sequence[LayerCost]
    num_groups: int
    states: Sequence[GroupState]
    whole_matrices: Collection[int] = ()

    def zero_shape(self, layout: Layout, data_size: int, half: bool) -> ZeroShape:
        """How the engine lays its state out under a layout."""
        return ZeroShape(layout.zero, data_size, self.states, half, layout.pipeline > 1, self.whole_matrices)

    def stage_weights(self, first: int, end: int) -> list[Weight]:
        """The parameters that layers `first` to `end` - 1 hold, each once."""
        names = set().union(*self.held[first:end])
        return [weight for name, weight in self.weights.items() if name in names]


@dataclass(frozen=True)
class Work:
    """One optimizer step: samples, samples of a micro-batch, and the precision of weights and products."""

    global_batch: int
    micro_batch: int
    half: bool


@dataclass
class LayoutEstimate:
    """What a layout will cost on its fullest GPU and its slowest stage; `refused` says why it cannot be."""

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
    counted: Counted, layout: Layout, data_size: int, micro_steps: int, work: Work, machine: Machine
) -> LayoutEstimate:
    """Work out one layout that is not refused otherwise; UserError where it has more stages than layers."""
    bounds = stage_bounds([cost.flops for cost in counted.costs], layout.pipeline)
    shape = counted.zero_shape(layout, data_size, work.half)
    stages = [_Stage(counted, a, b) for a, b in itertools.pairwise(bounds)]
    memories = [_memory(stage, number, len(stages), micro_steps, shape) for number, stage in enumerate(stages)]
    found = LayoutEstimate(layout, data_size, None, bounds, micro_steps)
    found.memory = max(memories, key=lambda memory: sum(memory.values()))
    found.bubble = (layout.pipeline - 1) / (micro_steps + layout.pipeline - 1)
    found.padding = 1 - work.global_batch / (micro_steps * work.micro_batch * data_size)
    found.traffic = _traffic(stages, layout, shape, micro_steps)
    found.seconds = _seconds(stages, found, work, machine)
    if (room := machine.memory_bytes * (1 - FREE_SHARE)) < found.memory_bytes:
        of = f"{found.memory_bytes / 2**30:.1f} of {room / 2**30:.1f} GiB"
        found.refused = f"does not fit: {of}, most of it {max(found.memory, key=lambda kind: found.memory[kind])}"
    return found


class _Stage:
    """The layers of one pipeline stage."""

    def __init__(self, counted: Counted, first: int, end: int):
        self.costs, self.num_groups = counted.costs[first:end], counted.num_groups
        self.weights = counted.stage_weights(first, end)
        before = counted.costs[first - 1] if first else None
        self.received = before.sent_bytes if before else 0
        self.crossing = (before.sent_bytes + before.returned_bytes) if before else 0
        self.flops = sum(cost.flops for cost in self.costs)
        self.reduced = sum(cost.reduced_bytes for cost in self.costs)
        self.trained = sum(weight.numel for weight in self.weights if weight.group is not None)
        self.all = sum(weight.numel for weight in self.weights)


def _memory(stage: _Stage, number: int, stages: int, micro_steps: int, shape: ZeroShape) -> dict[str, int]:
    """Bytes by kind; a stage of a pipeline keeps the activations of all micro-batches that are under way behind it."""
    item, in_flight = 2 if shape.half else 4, min(stages - number, micro_steps)
    kinds = fullest(stage.weights, stage.num_groups, shape)
    kinds["activations"] = in_flight * (activation_bytes(stage.costs) + stage.received)
    kinds["buckets"] = BUCKET * 4
    if shape.zero == 3:
        kinds["buckets"] += min(stage.all, 2 * BUCKET) * item
    return kinds


def _traffic(stages: list[_Stage], layout: Layout, shape: ZeroShape, micro_steps: int) -> dict[str, int]:
    """Bytes that the busiest GPU sends in a step: over its tensor group, its data group, to the next stage."""
    item, ring = 2 if shape.half else 4, (shape.data_size - 1) / shape.data_size
    tensor_ring = 2 * (layout.tensor - 1) / layout.tensor
    trained, everything = (max(getattr(stage, kind) for stage in stages) for kind in ("trained", "all"))
    if shape.zero == 3:  # weights for the forward and the backward pass, gradients, each micro-batch
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


def _seconds(stages: list[_Stage], found: LayoutEstimate, work: Work, machine: Machine) -> dict[str, float]:
    """Seconds of a step by what they go to; the slowest stage sets the pace of a pipeline."""
    layout, peak = found.layout, machine.half_flops_per_s if work.half else machine.single_flops_per_s
    node, network = (LINK_EFFICIENCY * rate for rate in (machine.node_bytes_per_s, machine.network_bytes_per_s))

    def link(span: int) -> float:
        """The rate between ranks of a group that spans so many neighbours."""
        return node if span <= machine.gpus_per_node else network

    beside = layout.tensor * found.data_size
    compute = found.micro_steps * max(stage.flops for stage in stages) / (peak * EFFICIENCY)
    seconds = {
        "compute": compute,
        "tensor": found.traffic["tensor"] / link(layout.tensor),
        "data": found.traffic["data"] / link(beside),
        "pipeline": found.traffic["pipeline"] / link(beside * layout.pipeline),
    }
    pace = seconds["compute"] + seconds["tensor"] + seconds["pipeline"]
    seconds["bubble"] = pace * (layout.pipeline - 1) / found.micro_steps
    return seconds
