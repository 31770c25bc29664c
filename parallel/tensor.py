"""Tensor parallelism: cut linear layers, embeddings and convolutions over the tensor-parallel ranks, by a plan.

For each class of module, the plan says how its children are cut: `column` by outputs; `row` by inputs, with a sum over
ranks after it; `vocabulary` by the rows of an embedding; `head` by outputs that are gathered again. Children are
replaced in place by modules with the same parameter names, so a checkpoint does not depend on the cut. Parameters that
are not in the plan are replicated on every tensor-parallel rank and get equal gradients there; DeepSpeed counts them
once in the gradient norm (it reads the attribute `tensor_model_parallel` of a parameter).

Linear layers and embeddings are those of megatron-core (0.16.1), imported when something is cut. Their matrix products,
`_Column` and `_Row`, are our own: megatron-core rounds to the weights' precision before it adds the bias or the parts
of other ranks, so in bf16 its losses differ by 0.4% from those of one process. Ours add in fp32 and round once, as one
process does; the cost is twice the bytes in a sum over ranks. Also our own are convolutions, which megatron-core lacks,
and the gathering of logits, which in megatron-core needs CUDA.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.checkpoint.boxes import TensorCut

Group = dist.ProcessGroup


@dataclass(frozen=True)
class Split:
    """How a module is cut. Its outputs are `parts` runs of equal length (such as the halves of a gated unit).

    Each run is cut separately.
    """

    kind: Literal["column", "row", "vocabulary", "head"]
    parts: int = 1


@dataclass(frozen=True)
class ModulePlan:
    """The plan of one module class: child path -> its cut; `counts` are attributes to divide, such as `num_heads`."""

    splits: Mapping[str, Split]
    counts: tuple[str, ...] = ()


Plan = Mapping[type[nn.Module], ModulePlan]
COLUMN, ROW = Split("column"), Split("row")


def apply_tensor_parallel(model: nn.Module, holders: Iterable[nn.Module], plan: Plan, group: Group) -> None:
    """Cut `model` over the ranks of `group`, in place; `holders` are other modules that refer to its parts.

    The weights must be equal on every rank. One on the meta device is cut in shape; its attribute `stored`, if it has
    one, goes on to the part, so that its values can be read afterwards. Raises ValueError with the module's name if a
    size is not divisible by the number of ranks.
    """
    if group.size() == 1:
        return
    replaced: dict[int, nn.Module] = {}
    for name, module in list(model.named_modules()):
        entry = plan.get(type(module))
        if entry is None:
            continue
        for path, split in entry.splits.items():
            child = module.get_submodule(path)
            try:
                replaced[id(child)] = _MAKE[split.kind, _family(child)](child, split.parts, group)
            except ValueError as error:
                raise ValueError(f"{name}.{path}: {error}") from None
        for count in entry.counts:
            setattr(module, count, _divide(getattr(module, count), group))
    for root in (model, *holders):
        for module in root.modules():
            for child_name, child in list(module.named_children()):
                if id(child) in replaced:
                    setattr(module, child_name, replaced[id(child)])


def _divide(number: int, group: Group) -> int:
    if number % group.size():
        raise ValueError(f"{number} is not divisible by tensor {group.size()}")
    return number // group.size()


def _family(module: nn.Module) -> str:
    for family in (nn.Linear, nn.Conv2d, nn.Embedding):
        if isinstance(module, family):
            return family.__name__
    raise ValueError(f"{type(module).__name__} cannot be cut")


def _shard(whole: Tensor, dim: int, parts: int, group: Group) -> nn.Parameter:
    """Return this rank's slice of a parameter, with the attributes that checkpoints and the gradient norm read."""
    size = whole.shape[dim]
    if size % parts:
        raise ValueError(f"{size} cannot be divided into {parts} equal parts")
    run = size // parts
    length = _divide(run, group)
    segments = tuple((part * run + group.rank() * length, length) for part in range(parts))
    pieces = [whole.detach().narrow(dim, start, length) for start, length in segments]
    parameter: Any = nn.Parameter(torch.cat(pieces, dim).contiguous(), requires_grad=whole.requires_grad)
    parameter.tensor_cut = TensorCut(dim, tuple(whole.shape), segments)
    parameter.tensor_model_parallel = True
    return _as_stored(whole, parameter)


def _replicated(parameter: Tensor | None) -> nn.Parameter | None:
    """Return a copy of a parameter that every tensor-parallel rank holds."""
    if parameter is None:
        return None
    return _as_stored(parameter, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))


def _as_stored(whole: Tensor, parameter: Any) -> nn.Parameter:
    """Return a parameter with the note where its values are, if `whole` has one."""
    if hasattr(whole, "stored"):
        parameter.stored = whole.stored  # type: ignore[attr-defined]
    return parameter


# -- megatron-core's linears and embedding ---------------------------------------------------------


@functools.cache
def _megatron() -> Any:
    with warnings.catch_warnings():  # at import it warns that Transformer Engine and Apex are not installed
        warnings.simplefilter("ignore")
        from megatron.core import ModelParallelConfig
        from megatron.core.tensor_parallel import layers
    if not torch.cuda.is_available():  # the warning is about GPU streams
        warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS", module="megatron.core")

    class Column(layers.ColumnParallelLinear):
        """A linear layer cut by outputs; returns this rank's outputs."""

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return cast(Tensor, _Column.apply(x, self.weight, self.bias, self.tp_group))

    class Head(Column):
        """The same, but returns the outputs of all ranks."""

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return cast(Tensor, _Gather.apply(super().forward(x), self.tp_group))

    class Row(layers.RowParallelLinear):
        """A linear layer cut by inputs; returns the sum over the ranks."""

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return cast(Tensor, _Row.apply(x, self.weight, self.bias, self.tp_group))

    def config(group: Group) -> Any:
        return ModelParallelConfig(
            tensor_model_parallel_size=group.size(),
            use_cpu_initialization=True,
            perform_initialization=False,
            gradient_accumulation_fusion=False,
        )

    return layers, Column, Head, Row, config


def _linear(kind: Any, linear: Any, config: Any, group: Group, **keys: bool) -> Any:
    """Return a layer of class `kind` with the sizes of `linear`; the caller sets its parameters."""
    return kind(
        linear.in_features,
        linear.out_features,
        config=config,
        init_method=None,
        bias=linear.bias is not None,
        skip_bias_add=False,
        tp_group=group,
        **keys,
    )


def _column(linear: Any, parts: int, group: Group, gathered: bool = False) -> nn.Module:
    _, column, head, _, config = _megatron()
    _divide(linear.out_features, group)
    made = _linear(head if gathered else column, linear, config(group), group, gather_output=False)
    made.weight = _shard(linear.weight, 0, parts, group)
    made.bias = None if linear.bias is None else _shard(linear.bias, 0, parts, group)
    return made


def _row(linear: Any, parts: int, group: Group) -> nn.Module:
    _, _, _, row, config = _megatron()
    _divide(linear.in_features, group)
    made = _linear(row, linear, config(group), group, input_is_parallel=True)
    made.weight = _shard(linear.weight, 1, parts, group)
    made.bias = _replicated(linear.bias)
    return made


def _vocabulary(embedding: Any, parts: int, group: Group) -> nn.Module:
    layers, *_, config = _megatron()
    _divide(embedding.num_embeddings, group)
    made: Any = layers.VocabParallelEmbedding(
        embedding.num_embeddings, embedding.embedding_dim, init_method=None, config=config(group), tp_group=group
    )
    made.weight = _shard(embedding.weight, 0, parts, group)
    return made


# -- products --------------------------------------------------------------------------------------


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """Return the product (N, O) of matrices (N, I) and (I, O) in fp32, which is how GPUs accumulate bf16 products."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


class _Column(torch.autograd.Function):
    """Multiply x (..., I) by this rank's rows of a weight and add the bias; the gradient of x is summed over ranks.

    The weight is that of a linear layer (O / t, I) or a pointwise convolution (O / t, I, 1, 1). It is passed
    unflattened, because ZeRO stage 3 fills it in later.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: Group) -> Tensor:
        ctx.group = group
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return F.linear(x, weight.flatten(1), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        rows, grad_x, pending = grad.flatten(0, -2), None, None
        if ctx.needs_input_grad[0]:
            grad_x = matmul_fp32(rows, weight.flatten(1))
            pending = dist.all_reduce(grad_x, group=ctx.group, async_op=True)  # overlaps with the products below
        parameter_gradients = _parameter_gradients(ctx, rows, x, weight)
        if pending is not None:
            pending.wait()
            grad_x = cast(Tensor, grad_x).to(grad.dtype).view(*grad.shape[:-1], -1)
        return grad_x, *parameter_gradients, None


class _Row(torch.autograd.Function):
    """Multiply this rank's x (..., I / t) by its columns of a weight (O, I / t, ...), sum over ranks, add the bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: Group) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        part = matmul_fp32(x.flatten(0, -2), weight.flatten(1).t())
        dist.all_reduce(part, group=group)
        if not x.is_contiguous():  # for such an input, torch's linear layer (2.13) rounds before it adds the bias
            part = part.to(x.dtype)
        if bias is not None:
            part += bias
        return part.to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad_x = grad @ weight.flatten(1) if ctx.needs_input_grad[0] else None
        return grad_x, *_parameter_gradients(ctx, grad.flatten(0, -2), x, weight), None


def _parameter_gradients(ctx: Any, rows: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of weight and bias from those of the outputs, `rows` (N, O); None if not required."""
    grad_weight = (rows.t() @ x.flatten(0, -2)).view_as(weight) if ctx.needs_input_grad[1] else None
    return grad_weight, rows.sum(dim=0) if ctx.needs_input_grad[2] else None


class _Gather(torch.autograd.Function):
    """Concatenate the last dimension of all ranks; the gradient is this rank's part of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.rank, ctx.width = group.rank(), x.shape[-1]
        outputs = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(outputs, x.contiguous(), group=group)
        return torch.cat(outputs, dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.narrow(-1, ctx.rank * ctx.width, ctx.width).contiguous(), None


# -- convolutions ----------------------------------------------------------------------------------


class ColumnConv(nn.Conv2d):
    """A convolution cut by output channels: a pointwise one with the full input on all ranks, or a depthwise one."""

    group: Group

    def forward(self, input: Tensor) -> Tensor:
        """Return this rank's channels (B, C / t, H, W)."""
        if self.groups > 1:
            return super().forward(input)
        return _pointwise(_Column, input, self)


class RowConv(nn.Conv2d):
    """A pointwise convolution cut by input channels, summed over the ranks."""

    group: Group

    def forward(self, input: Tensor) -> Tensor:
        """Return all channels (B, C, H, W), from this rank's input channels (B, C' / t, H, W)."""
        return _pointwise(_Row, input, self)


def _pointwise(product: Any, input: Tensor, conv: Any) -> Tensor:
    return product.apply(input.permute(0, 2, 3, 1), conv.weight, conv.bias, conv.group).permute(0, 3, 1, 2)


def _conv(kind: type[Any], conv: Any, channels: tuple[int, int], groups: int, group: Group) -> Any:
    """Return a convolution of class `kind` like `conv`, with other channels (in, out); the caller sets parameters."""
    made = kind(
        *channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, groups, bias=False, device="meta"
    )
    made.group = group
    return made


def _column_conv(conv: Any, parts: int, group: Group) -> nn.Module:
    depthwise = conv.groups > 1
    if depthwise and not conv.groups == conv.in_channels == conv.out_channels:
        raise ValueError(f"a convolution of {conv.groups} groups and {conv.in_channels} channels cannot be cut")
    if not depthwise:
        _check_pointwise(conv)
    outputs = _divide(conv.out_channels, group)
    channels = (outputs, outputs) if depthwise else (conv.in_channels, outputs)
    made = _conv(ColumnConv, conv, channels, outputs if depthwise else 1, group)
    made.weight = _shard(conv.weight, 0, parts, group)
    made.bias = None if conv.bias is None else _shard(conv.bias, 0, parts, group)
    return made


def _check_pointwise(conv: Any) -> None:
    if (conv.kernel_size, conv.stride, conv.padding) != ((1, 1), (1, 1), (0, 0)):
        raise ValueError(f"a convolution of kernel {conv.kernel_size} over all channels cannot be cut")


def _row_conv(conv: Any, parts: int, group: Group) -> nn.Module:
    if conv.bias is not None or conv.groups > 1:
        raise ValueError("a convolution with a bias or groups cannot be cut by its inputs")
    _check_pointwise(conv)
    made = _conv(RowConv, conv, (_divide(conv.in_channels, group), conv.out_channels), 1, group)
    made.weight = _shard(conv.weight, 1, parts, group)
    return made


_MAKE: dict[tuple[str, str], Callable[[Any, int, Group], nn.Module]] = {
    ("column", "Linear"): _column,
    ("row", "Linear"): _row,
    ("head", "Linear"): functools.partial(_column, gathered=True),
    ("vocabulary", "Embedding"): _vocabulary,
    ("column", "Conv2d"): _column_conv,
    ("row", "Conv2d"): _row_conv,
}
