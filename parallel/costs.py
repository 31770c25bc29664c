"""Count the costs of each layer of a program on the meta device: operations, saved activations, bytes at its edges.

Every layer runs forward and backward on tensors with shapes but without values, under torch's counters. So a program
has the same costs on every machine and at every start: all ranks compute the same pipeline cut, and a model of billions
of parameters is counted in seconds without allocating it. The counts are those of the actual computation: a frozen
layer costs its forward pass, about twice that if a gradient passes through it, and a trained layer three times.
The trade-off of counting instead of measuring: everything except matrix products and convolutions (norms, softmax,
resizing) costs nothing.

Attention is counted like a fused kernel, which stores no attention probabilities. The formulas are our own, because
`FlopCounterMode` (torch 2.13) counts nothing for the only fused kernel that works on `meta`, and counts the backward
pass of a depthwise convolution as if each channel read all others.
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
    """The costs of one layer for one micro-batch.

    `saved` maps a storage that the backward pass needs to its bytes; layers that save the same storage have the same
    key. `reduced_bytes` are those of its tensor-parallel collectives, forward and backward. `sent_bytes` and
    `returned_bytes` are the slots and the gradients that cross a pipeline cut after this layer.
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
    """Count each layer on one micro-batch of `slots`, of which only shapes and dtypes are used.

    `dtype` is that of the weights in the run. The layers are not changed: copies on the meta device are run.
    """
    copies = _meta_copies(layers, dtype)
    weights = {_storage_key(tensor) for module in _modules(copies) for tensor in _tensors(module)}
    edges, crossing = live_slots(layers, list(slots), terms), crossing_slots(layers, list(slots), terms)
    live = {name: torch.empty_like(slots[name], device="meta") for name in edges[0]}
    alive: list[Any] = []  # keeps storages alive: the key of a freed storage (its address) may be used again
    costs, latest = [], dict(live)
    for layer, live_after, sent in zip(copies, edges[1:], crossing[1:], strict=True):
        cost, live = _layer_cost(layer, live, live_after, recompute, weights, alive)
        latest |= live
        sent_bytes = sum(_bytes(latest[name]) for name in sent)
        returned_bytes = sum(_bytes(latest[name]) for name in sent if latest[name].requires_grad)
        costs.append(replace(cost, sent_bytes=sent_bytes, returned_bytes=returned_bytes))
    return costs


def shapes_after(layers: Sequence[Layer], slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return all slots after the layers have run, on the meta device and without gradient."""
    live = {name: torch.empty_like(tensor, device="meta") for name, tensor in slots.items()}
    with torch.no_grad():
        for layer in _meta_copies(layers, torch.float32):
            live |= layer(**{name: live[name] for name in layer.reads})  # type: ignore[union-attr]
    return live


def activation_bytes(costs: Iterable[LayerCost]) -> int:
    """Return the bytes that the layers save for their backward pass, each storage once."""
    saved: dict[int, int] = {}
    for cost in costs:
        saved |= cost.saved
    return sum(saved.values())


def balanced_cut(weights: Sequence[float], stages: int) -> list[int]:
    """Cut a list into consecutive non-empty runs so that the heaviest run is as light as possible; return the bounds.

    Returns `stages` + 1 numbers from 0 to the length. Of equally good cuts it returns the one with the earliest bounds,
    compared from the last bound to the first. Raises ValueError for more runs than entries. DeepSpeed's
    `partition_balanced` (0.19.8) is not used, because it reduces the difference between the heaviest and the lightest
    run in local steps, which can leave a heavier run.
    """
    length = len(weights)
    if not 1 <= stages <= length:
        raise ValueError(f"{length} entries cannot be cut into {stages} non-empty runs")
    before = [0.0]  # prefix sums of the weights
    for weight in weights:
        before.append(before[-1] + weight)
    # Dynamic programming. heaviest[runs - 1][end]: the heaviest run of the best cut of the first `end` entries.
    heaviest = [before]
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
    layer: nn.Module,
    live: dict[str, Tensor],
    live_after: Sequence[str],
    recompute: bool,
    weights: set[int],
    alive: list[Any],
) -> tuple[LayerCost, dict[str, Tensor]]:
    """Run one layer forward and backward; return its costs and the slots after it, detached from its graph."""
    assert isinstance(layer, Layer)
    saved: dict[int, int] = {}

    def record_saved(tensor: Tensor) -> Tensor:
        if _storage_key(tensor) not in weights:
            storage = tensor.untyped_storage()
            alive.append(storage)
            saved[_storage_key(tensor)] = storage.nbytes()
        return tensor

    if recompute and layer.recomputes:
        for name in layer.reads:  # the recomputation needs the inputs; the hook below does not see them
            record_saved(live[name])
    with _Collectives() as reduced:
        with saved_tensors_hooks(record_saved, lambda tensor: tensor):
            after, forward = _count_flops(lambda: run_layer(layer, live, live_after, recompute))
        outputs = [tensor for tensor in after.values() if tensor.grad_fn is not None]
        _, backward = _count_flops(lambda: _backward(outputs))
    after = {name: tensor.detach().requires_grad_(tensor.requires_grad) for name, tensor in after.items()}
    alive += after.values()
    return LayerCost(forward, backward, saved, reduced.bytes), after


def _meta_copies(layers: Sequence[Layer], dtype: torch.dtype) -> nn.ModuleList:
    """Return copies of the layers on the meta device; modules and tensors that layers share stay shared."""
    original = nn.ModuleList(layers)
    memo: dict[int, Any] = {}
    for tensor in itertools.chain.from_iterable(map(_tensors, _modules(original))):
        shape = torch.empty_like(tensor, device="meta")
        is_weight = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(shape, tensor.requires_grad) if is_weight else shape
    for value in itertools.chain.from_iterable(vars(module).values() for module in original.modules()):
        if isinstance(value, dist.ProcessGroup):  # cannot be copied
            memo[id(value)] = value
    copies = copy.deepcopy(original, memo).to(dtype)
    for layer in copies:
        # The method is wrapped, not its caller, because a recomputation calls the method again in the backward pass.
        layer.forward = _with_fused_attention(layer.forward)
    return copies


def _modules(layers: nn.ModuleList) -> list[nn.Module]:
    """Return the layers, and the modules that stand beside them."""
    return [layers, *(module for layer in layers for module in layer.beside)]  # type: ignore[union-attr]


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _count_flops(run: Callable[[], Any]) -> tuple[Any, int]:
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with counter:
        result = run()
    return result, counter.get_total_flops()


def _backward(outputs: list[Tensor]) -> None:
    if outputs:
        torch.autograd.backward(outputs, [torch.empty_like(tensor) for tensor in outputs])


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _FusedAttention(TorchFunctionMode):
    """Replaces attention by the only fused kernel that torch supports on the meta device."""

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
    bias = None if attn_mask is None else torch.zeros_like(attn_mask, dtype=q.dtype)  # kernels take a mask as a bias
    return _ATTENTION(q, k, v, attn_mask=bias)[0]


class _Collectives(TorchDispatchMode):
    """Sums the bytes of collectives and runs them as they are: in a fake world they do nothing."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = args[0] if isinstance(args[0], list) else args[1]
            self.bytes += sum(_bytes(t) for t in _flat(tensors))
        return func(*args, **(kwargs or {}))


def _flat(tensors: Any) -> list[Tensor]:
    return [t for item in tensors for t in (_flat(item) if isinstance(item, list) else [item])]


def _attention_flops(q: Any, k: Any, v: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
    """Count two products of (N_q, D) and (D, N_k) per head, at 2 operations per multiply-add."""
    batch, heads, queries, width = q
    return 4 * batch * heads * queries * k[2] * width


def _attention_backward_flops(grad: Any, q: Any, k: Any, *_: Any, **__: Any) -> int:
    """Count five such products, one of which recomputes the forward's."""
    return _attention_flops(q, k, k) * 5 // 2


def _convolution_backward_flops(grad: Any, x: Any, weight: Any, *rest: Any, **_: Any) -> int:
    """Count the forward's operations once per required gradient, of the input and of the weight."""
    output_mask = rest[-1]
    return 2 * math.prod(grad) * math.prod(weight[1:]) * (output_mask[0] + output_mask[1])


_FORMULAS = {
    _ATTENTION: _attention_flops,
    _ATTENTION_BACKWARD: _attention_backward_flops,
    torch.ops.aten.convolution_backward: _convolution_backward_flops,
}
