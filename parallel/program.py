"""A training stage as a list of layers that read and write named slots.

Each training stage has one forward pass, written once as a list. Run in order in one module, it serves ZeRO stages 1, 2
and 3; cut into consecutive parts, it serves the pipeline. The slots that cross a cut are computed from the declarations
of the layers: a slot is sent if a later layer reads it. The trade-off is that every layer must declare its slots; the
names are checked before the first step.

A slot is a contiguous tensor whose first dimension is the micro-batch (B, ...). `run_layer` makes slots contiguous
without a cut too, because a slot that has crossed a cut is contiguous, and in bf16 torch rounds products of contiguous
and other tensors differently. At a boundary, a floating slot without gradient is viewed as integers, because
DeepSpeed's pipeline (0.19.8) expects a gradient for every floating tensor that it sends.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from parallel.errors import UserError

_AS_INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
_AS_FLOAT = {integer: floating for floating, integer in _AS_INTEGER.items()}


class Layer(nn.Module):
    """One entry of the list: a module that maps the slots it reads to the slots it writes.

    Subclasses set `reads` and `writes`; `forward(**slots) -> dict` takes exactly the read slots by name and returns
    exactly the written ones. Slots in `detached` are written without gradient (teachers, frozen encoders). A loss layer
    writes a slot of shape (B,), fp32, with one value per sample. A layer whose forward has side effects sets
    `recomputes` to False. A layer without parameters whose outputs follow cheaply from slots that are sent anyway
    (masks, rotary angles) sets `derived`: a pipeline repeats it in each pipeline stage that reads its outputs instead
    of sending them. The parameters belong to the training stage's model; a layer only refers to parts of it. Modules in
    `beside` are run by the layer and are not the engine's: it neither trains, shards, converts nor moves them.
    """

    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    detached: frozenset[str] = frozenset()
    recomputes: bool = True
    derived: bool = False
    beside: tuple[nn.Module, ...] = ()

    @property
    def name(self) -> str:
        """Name for messages."""
        return type(self).__name__

    def forward(self, **slots: Tensor) -> dict[str, Tensor]:
        """Compute the written slots from the read ones."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Layer:
        """Set the mode; a layer whose parameters are all frozen stays in eval mode."""
        super().train(mode and any(parameter.requires_grad for parameter in self.parameters()))
        return self


class Apply(Layer):
    """A layer that is one call: `function` maps the slots it reads, in their order, to those it writes, in theirs.

    `function` is a module of the model, or a function that holds no module: one inside a closure would be hidden from
    the engine.
    """

    def __init__(
        self,
        function: Callable[..., Tensor | tuple[Tensor, ...]],
        reads: Sequence[str],
        writes: str | Sequence[str],
        frozen: bool = False,
    ):
        super().__init__()
        self.function, self.reads = function, tuple(reads)
        self.writes = (writes,) if isinstance(writes, str) else tuple(writes)
        self.detached = frozenset(self.writes if frozen else ())

    @property
    def name(self) -> str:
        """The function's name, or its module's class."""
        function = self.function.func if isinstance(self.function, functools.partial) else self.function
        return getattr(function, "__name__", type(function).__name__)

    def forward(self, **slots: Tensor) -> dict[str, Tensor]:
        """Call the function."""
        written = self.function(*(slots[name] for name in self.reads))
        return dict(zip(self.writes, written if isinstance(written, tuple) else (written,), strict=True))


class Program(nn.Module):
    """The list of layers run in order on one device.

    `inputs` are the slots that a batch provides, `terms` the per-sample losses that the list must write. Raises
    UserError if a layer reads a slot that neither the batch nor an earlier layer provides.
    """

    def __init__(self, layers: Sequence[Layer], inputs: Sequence[str], terms: Sequence[str], recompute: bool = False):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.recompute = recompute
        self.inputs, self.terms = tuple(inputs), tuple(terms)
        self.boundaries = live_slots(layers, self.inputs, self.terms)

    def forward(self, slots: Mapping[str, Tensor]) -> Tensor:
        """Run all layers; return the terms stacked as (B, T), fp32, in the order of `terms`."""
        live = {name: slots[name] for name in self.boundaries[0]}
        for layer, live_after in zip(self.layers, self.boundaries[1:], strict=True):
            live = run_layer(layer, live, live_after, self.recompute)
        return torch.stack([live[name].float() for name in self.terms], dim=1)


class Subprogram:
    """The layers of a list that are needed to compute the slots `outputs`, for uses that need no loss.

    The caller provides the slots in `given`, so the layers that compute them are left out. `inputs` are the slots that
    it reads. It uses the layers themselves, not copies. Raises ValueError if a layer that is needed would also write a
    given slot.
    """

    def __init__(self, layers: Sequence[Layer], outputs: Sequence[str], given: Collection[str] = ()):
        live, needed = set(outputs) - set(given), []
        for layer in reversed(layers):
            if live & set(layer.writes):
                if twice := set(given) & set(layer.writes):
                    raise ValueError(f"{layer.name} is needed and would write {sorted(twice)}, which are given")
                live = (live - set(layer.writes)) | (set(layer.reads) - set(given))
                needed.append(layer)
        self.layers: list[Layer] = needed[::-1]
        read = {name for layer in needed for name in layer.reads}
        self.inputs = tuple(sorted(live | (set(given) & (read | set(outputs)))))
        self._edges = live_slots(self.layers, self.inputs, outputs)

    def __call__(self, slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the layers on the slots in `inputs`; return the slots in `outputs`."""
        live = {name: slots[name] for name in self._edges[0]}
        for layer, live_after in zip(self.layers, self._edges[1:], strict=True):
            live = run_layer(layer, live, live_after)
        return live


def run_layer(
    layer: nn.Module, live: Mapping[str, Tensor], live_after: Sequence[str], recompute: bool = False
) -> dict[str, Tensor]:
    """Run one layer on the live slots; return the slots `live_after`, which later layers read.

    With `recompute`, the activations inside the layer are not saved but computed again in the backward pass.
    """
    assert isinstance(layer, Layer)
    read = {name: live[name] for name in layer.reads}
    run = functools.partial(layer, **read)
    written: dict[str, Tensor] = (
        cast(Any, checkpoint(run, use_reentrant=False)) if recompute and layer.recomputes else run()
    )
    if set(written) != set(layer.writes):
        raise TypeError(f"{layer.name} wrote {sorted(written)}, declared {sorted(layer.writes)}")
    written = {n: (t.detach() if n in layer.detached else t).contiguous() for n, t in written.items()}
    merged = {**live, **written}
    return {name: merged[name] for name in live_after}


def live_slots(layers: Sequence[Layer], inputs: Sequence[str], terms: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the slots that later layers read, for the edge before each layer and the edge after the last."""
    known = set(inputs)
    for layer in layers:
        if missing := set(layer.reads) - known:
            raise UserError(f"{layer.name} reads {sorted(missing)}, which no earlier layer or batch provides")
        known |= set(layer.writes)
    if missing := set(terms) - known:
        raise UserError(f"no layer writes the loss term(s) {sorted(missing)}")
    live = set(terms)
    edges = [tuple(sorted(live))]
    for layer in reversed(layers):
        live = (live - set(layer.writes)) | set(layer.reads)
        edges.append(tuple(sorted(live)))
    return edges[::-1]


def crossing_slots(layers: Sequence[Layer], inputs: Sequence[str], terms: Sequence[str]) -> list[tuple[str, ...]]:
    """Return, for each edge of `live_slots`, the slots that travel where a pipeline stage ends there."""
    edges = live_slots(layers, inputs, terms)
    return [tuple(sorted(_repeated(layers[:index], edge)[1])) for index, edge in enumerate(edges)]


def repeat_derived(
    layers: Sequence[Layer], bounds: Sequence[int], inputs: Sequence[str], terms: Sequence[str]
) -> tuple[list[Layer], list[int]]:
    """Put the derived layers that a pipeline stage reads from at its start; return the longer list and its bounds.

    `bounds` are the numbers of the first layer of each stage, and of all layers.
    """
    edges = live_slots(layers, inputs, terms)
    longer, starts = list(layers[: bounds[1]]), [0]
    for first, end in itertools.pairwise(bounds[1:]):
        starts.append(len(longer))
        longer += [*_repeated(layers[:first], edges[first])[0], *layers[first:end]]
    return longer, [*starts, len(longer)]


def _repeated(before: Sequence[Layer], edge: Collection[str]) -> tuple[list[Layer], set[str]]:
    """Return the derived layers among those before an edge that give some of its slots, and the slots they need."""
    live, repeated = set(edge), []
    for layer in reversed(before):
        if layer.derived and live & set(layer.writes):
            live = (live - set(layer.writes)) | set(layer.reads)
            repeated.append(layer)
    return repeated[::-1], live


def pack(slots: Mapping[str, Tensor], names: Sequence[str]) -> tuple[Tensor, ...]:
    """Return slots as the tuple that crosses a boundary; floats without gradient are viewed as integers.

    Real integer slots are int64 or uint8, so int16 and int32 at a boundary are always viewed floats.
    """
    packed = []
    for name in names:
        tensor = slots[name]
        if tensor.is_floating_point() and not tensor.requires_grad:
            tensor = tensor.detach().view(_AS_INTEGER[tensor.dtype])
        packed.append(tensor)
    return tuple(packed)


def unpack(tensors: Sequence[Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Invert `pack`."""
    return {
        name: tensor.view(_AS_FLOAT[tensor.dtype]) if tensor.dtype in _AS_FLOAT else tensor
        for name, tensor in zip(names, tensors, strict=True)
    }
