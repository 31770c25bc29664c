"""What each layer of a program costs, counted on the meta device: operations, activations, what crosses its edges.

Every layer runs forward and backward on tensors that have shapes and no values, under torch's counters, so the
same program costs the same on every machine and at every start: all ranks agree on a pipeline's cut, and a model of
billions of parameters is counted in seconds without its memory. What is counted is what happens: a frozen layer that
no gradient passes costs its forward, one that a gradient passes about twice that, one that trains three times.
The price of counting rather than measuring: what is no product of matrices (norms, softmax, resizing) costs nothing.

Attention is counted as a fused kernel does it, which keeps no matrix of probabilities. Written by hand, because
`FlopCounterMode` (torch 2.13) counts nothing for the one fused kernel that has shapes on `meta`, and the backward of a
depthwise convolution as if each channel read all others.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from parallel.program import Layer, crossing_slots, live_slots, run_layer

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class LayerCost:
    """One layer on one micro-batch.

    `saved` are the bytes of each storage that its backward needs, by a key that layers share which save the
    same one; `reduced_bytes` what its collectives over tensor ranks carry, both ways; `sent_bytes` and
    `returned_bytes` what a pipeline cut behind it sends on, and gets back as gradients.
    """

    forward_flops: int
    backward_flops: int
    saved: Mapping[int, int]
    reduced_bytes: int
    sent_bytes: int = 0
    returned_bytes: int = 0

    @property
    def flops(self) -> int:
        """Operations of a training step."""
        return self.forward_flops + self.backward_flops


def layer_costs(
    layers: Sequence[Layer],
    slots: Mapping[str, Tensor],
    terms: Sequence[str],
    dtype: torch.dtype = torch.float32,
    recompute: bool = False,
) -> list[LayerCost]:
    """Count each layer on one micro-batch of `slots`, of which only shapes and dtypes are read.

    `dtype` is that of the weights in the run. The layers stay as they are: copies without values are run.
    """
    shadows = _without_values(layers, dtype)
    weights = {_key(tensor) for tensor in (*shadows.parameters(), *shadows.buffers())}
    edges, crossing = live_slots(layers, list(slots), terms), crossing_slots(layers, list(slots), terms)
    live = {name: torch.empty_like(slots[name], device="meta") for name in edges[0]}
    alive: list[Any] = []  # a storage's key is its own only as long as it lives
    costs, seen = [], dict(live)
    for layer, keep, sent in zip(shadows, edges[1:], crossing[1:], strict=True):
        cost, live = _layer_cost(layer, live, keep, recompute, weights, alive)
        seen |= live
        sent_bytes = sum(_bytes(seen[name]) for name in sent)
        returned_bytes = sum(_bytes(seen[name]) for name in sent if seen[name].requires_grad)
        costs.append(replace(cost, sent_bytes=sent_bytes, returned_bytes=returned_bytes))
    return costs


def shapes_after(layers: Sequence[Layer], slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return all slots after the layers have run, on the meta device and without gradient."""
    live = {name: torch.empty_like(tensor, device="meta") for name, tensor in slots.items()}
    with torch.no_grad():
        for layer in _without_values(layers, torch.float32):
            live |= layer(**{name: live[name] for name in layer.reads})  # type: ignore[union-attr]
    return live


def activation_bytes(costs: Iterable[LayerCost]) -> int:
    """Bytes that the layers keep for their backward pass, each storage once."""
    kept: dict[int, int] = {}
    for cost in costs:
        kept |= cost.saved
    return sum(kept.values())


def balanced_cut(weights: Sequence[float], stages: int) -> list[int]:
    """Cut a list into consecutive runs, none empty, such that the heaviest is lightest; return their bounds.

    `stages` + 1 numbers from 0 to the length; of equally good cuts the one whose runs end earliest, from the last.
    Raises ValueError for more runs than entries. DeepSpeed's `partition_balanced` (0.19.8) is not used: it lessens
    the difference between the heaviest and the lightest, and step by step, which can leave a heavier one.
    """
    length = len(weights)
    if not 1 <= stages <= length:
        raise ValueError(f"{length} entries do not make {stages} runs")
    before = [0.0]
    for weight in weights:
        before.append(before[-1] + weight)
    heaviest = [before]  # of runs - 1, entries: the heaviest run of the best cut
    for runs in range(2, stages + 1):
        last = [float("inf")] * (length + 1)
        for end in range(runs, length + 1):
            last[end] = min(max(heaviest[-1][start], before[end] - before[start]) for start in range(runs - 1, end))
        heaviest.append(last)
    bounds = [length]
    for runs in range(stages, 1, -1):
        end, best = bounds[-1], heaviest[runs - 1][bounds[-1]]
        fits = (s for s in range(runs - 1, end) if max(heaviest[runs - 2][s], before[end] - before[s]) == best)
        bounds.append(next(fits))
    return [0, *reversed(bounds)]


def _layer_cost(
    layer: nn.Module, live: dict[str, Tensor], keep: Sequence[str], recompute: bool, weights: set[int], alive: list[Any]
) -> tuple[LayerCost, dict[str, Tensor]]:
    """Run one layer both ways; return what it costs and the slots behind it, cut off from its graph."""
    assert isinstance(layer, Layer)
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if _key(tensor) not in weights:
            storage = tensor.untyped_storage()
            alive.append(storage)
            saved[_key(tensor)] = storage.nbytes()
        return tensor

    if recompute and layer.recomputes:
        for name in layer.reads:
            note(live[name])
    with _Collectives() as reduced:
        with saved_tensors_hooks(note, lambda tensor: tensor):
            after, forward = _counted(lambda: run_layer(layer, live, keep, recompute))
        starts = [tensor for tensor in after.values() if tensor.grad_fn is not None]
        _, backward = _counted(lambda: _backward(starts))
    after = {name: tensor.detach().requires_grad_(tensor.requires_grad) for name, tensor in after.items()}
    alive += after.values()
    return LayerCost(forward, backward, saved, reduced.bytes), after


def _without_values(layers: Sequence[Layer], dtype: torch.dtype) -> nn.ModuleList:
    """Copies of the layers on the meta device; what they share they go on sharing."""
    original = nn.ModuleList(layers)
    memo: dict[int, Any] = {}
    for tensor in (*original.parameters(), *original.buffers()):
        shape = torch.empty_like(tensor, device="meta")
        is_weight = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(shape, tensor.requires_grad) if is_weight else shape
    for value in itertools.chain.from_iterable(vars(module).values() for module in original.modules()):
        if isinstance(value, dist.ProcessGroup):
            memo[id(value)] = value
    shadows = copy.deepcopy(original, memo).to(dtype)
    for shadow in shadows:
        shadow.forward = _with_fused_attention(shadow.forward)  # not around it: a recomputation begins here
    return shadows


def _counted(run: Callable[[], Any]) -> tuple[Any, int]:
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with counter:
        result = run()
    return result, counter.get_total_flops()


def _backward(starts: list[Tensor]) -> None:
    if starts:
        torch.autograd.backward(starts, [torch.empty_like(tensor) for tensor in starts])


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _FusedAttention(TorchFunctionMode):
    """Attention by the one fused kernel that torch knows the shapes of without a device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _fused_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _with_fused_attention(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(**slots: Tensor) -> Any:
        with _FusedAttention():
            return forward(**slots)

    return run


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    bias = None if attn_mask is None else torch.zeros_like(attn_mask, dtype=q.dtype)  # as kernels read a mask
    return _ATTENTION(q, k, v, attn_mask=bias)[0]


class _Collectives(TorchDispatchMode):
    """Sums what collectives carry, and lets them be: no other rank is there."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = args[0] if isinstance(args[0], list) else args[1]
            self.bytes += sum(_bytes(t) for t in _flat(tensors))
        return func(*args, **(kwargs or {}))


def _flat(tensors: Any) -> list[Tensor]:
    return [t for item in tensors for t in (_flat(item) if isinstance(item, list) else [item])]


def _attention_flops(q: Any, k: Any, v: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
    """Two products of (N_q, D) and (D, N_k) in each head."""
    batch, heads, queries, width = q
    return 4 * batch * heads * queries * k[2] * width


def _attention_backward_flops(grad: Any, q: Any, k: Any, *_: Any, **__: Any) -> int:
    """Five such products, one of them the forward's again."""
    return _attention_flops(q, k, k) * 5 // 2


def _convolution_backward_flops(grad: Any, x: Any, weight: Any, *rest: Any, **_: Any) -> int:
    """As many as the forward's for each gradient that is asked for, of the input and of the weight."""
    wanted = rest[-1]
    return 2 * math.prod(grad) * math.prod(weight[1:]) * (wanted[0] + wanted[1])


_FORMULAS = {
    _ATTENTION: _attention_flops,
    _ATTENTION_BACKWARD: _attention_backward_flops,
    torch.ops.aten.convolution_backward: _convolution_backward_flops,
}
