"""Tensor parallelism: a model's linears, embeddings and convolutions cut over the tensor ranks, by a plan.

The plan says for a class of module how its children are cut: `column` by outputs, `row` by inputs with a sum
behind it, `vocabulary` by the rows of an embedding, `head` by outputs that are gathered again. Children are replaced
in place by modules whose parameters have the same names, so a checkpoint knows nothing of the cut. What no plan
names is whole on every tensor rank and gets the same gradients there; DeepSpeed counts it once (it reads
`tensor_model_parallel` of a parameter).

Linears and embeddings are megatron-core's (0.16.1), imported when something is cut. Written by hand are their
products, `_Column` and `_Row`: megatron-core's round to the weights' precision before they add bias or the other
ranks' parts, which in bf16 is another run than that of one process (0.4% in loss). Ours add in fp32 and round once,
as one process does; the price is twice the bytes in a sum over ranks. Also by hand, because megatron-core has none:
convolutions, of the same products; and the gathering of logits, whose own asks for CUDA.
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
    """How a module is cut. Its outputs are `parts` runs of equal length (the halves of a gated unit), each cut."""

    kind: Literal["column", "row", "vocabulary", "head"]
    parts: int = 1


@dataclass(frozen=True)
class ModulePlan:
    """For one class of module: child path -> how it is cut, and its attributes that count what is cut."""

    splits: Mapping[str, Split]
    counts: tuple[str, ...] = ()


Plan = Mapping[type[nn.Module], ModulePlan]
COLUMN, ROW = Split("column"), Split("row")


def apply_tensor_parallel(model: nn.Module, holders: Iterable[nn.Module], plan: Plan, group: Group) -> None:
    """Cut `model` over the ranks of `group`, in place; `holders` are other modules that refer to its parts.

    Weights must be there already, the same on every rank. Raises ValueError, naming the module, for a size that
    the group's does not divide.
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
            setattr(module, count, _share(getattr(module, count), group))
    for root in (model, *holders):
        for module in root.modules():
            for child_name, child in list(module.named_children()):
                if id(child) in replaced:
                    setattr(module, child_name, replaced[id(child)])


def _share(number: int, group: Group) -> int:
    if number % group.size():
        raise ValueError(f"{number} does not divide by tensor {group.size()}")
    return number // group.size()


def _family(module: nn.Module) -> str:
    for family in (nn.Linear, nn.Conv2d, nn.Embedding):
        if isinstance(module, family):
            return family.__name__
    raise ValueError(f"{type(module).__name__} cannot be cut")


def _shard(whole: Tensor, dim: int, parts: int, group: Group) -> nn.Parameter:
    """This rank's slice of a whole parameter, with what a checkpoint and the gradient norm must know of it."""
    size = whole.shape[dim]
    if size % parts:
        raise ValueError(f"{size} is not {parts} equal parts")
    run = size // parts
    length = _share(run, group)
    segments = tuple((part * run + group.rank() * length, length) for part in range(parts))
    pieces = [whole.detach().narrow(dim, start, length) for start, length in segments]
    parameter: Any = nn.Parameter(torch.cat(pieces, dim).contiguous(), requires_grad=whole.requires_grad)
    parameter.tensor_cut = TensorCut(dim, tuple(whole.shape), segments)
    parameter.tensor_model_parallel = True
    return parameter


def _whole(parameter: Tensor | None) -> nn.Parameter | None:
    """A parameter that every tensor rank holds."""
    return None if parameter is None else nn.Parameter(parameter.detach().clone(), parameter.requires_grad)


# -- megatron-core's linears and embedding ---------------------------------------------------------


@functools.cache
def _megatron() -> Any:
    with warnings.catch_warnings():  # it says at import that it does without Transformer Engine and Apex
        warnings.simplefilter("ignore")
        from megatron.core import ModelParallelConfig
        from megatron.core.tensor_parallel import layers
    if not torch.cuda.is_available():  # an advice for the streams of a GPU
        warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS", module="megatron.core")

    class Column(layers.ColumnParallelLinear):
        """A linear cut by outputs that returns them alone."""

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return cast(Tensor, _Column.apply(x, self.weight, self.bias, self.tp_group))

    class Head(Column):
        """The same with the outputs of all ranks."""

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return cast(Tensor, _Gather.apply(super().forward(x), self.tp_group))

    class Row(layers.RowParallelLinear):
        """A linear cut by inputs, summed over the ranks."""

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
    """A linear of `kind` of the whole one's sizes, its parameters still to be set."""
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
    _share(linear.out_features, group)
    made = _linear(head if gathered else column, linear, config(group), group, gather_output=False)
    made.weight = _shard(linear.weight, 0, parts, group)
    made.bias = None if linear.bias is None else _shard(linear.bias, 0, parts, group)
    return made


def _row(linear: Any, parts: int, group: Group) -> nn.Module:
    _, _, _, row, config = _megatron()
    _share(linear.in_features, group)
    made = _linear(row, linear, config(group), group, input_is_parallel=True)
    made.weight = _shard(linear.weight, 1, parts, group)
    made.bias = _whole(linear.bias)
    return made


def _vocabulary(embedding: Any, parts: int, group: Group) -> nn.Module:
    layers, *_, config = _megatron()
    _share(embedding.num_embeddings, group)
    made: Any = layers.VocabParallelEmbedding(
        embedding.num_embeddings, embedding.embedding_dim, init_method=None, config=config(group), tp_group=group
    )
    made.weight = _shard(embedding.weight, 0, parts, group)
    return made


# -- products --------------------------------------------------------------------------------------


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """Matrices (N, I) and (I, O) to their product (N, O) in fp32, which is how a GPU adds up bf16 anyway."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


class _Column(torch.autograd.Function):
    """x (..., I) by this rank's rows of a weight, plus bias; the gradient of x is summed over ranks.

    The weight is a linear's (O / t, I) or a pointwise convolution's (O / t, I, 1, 1), whole: ZeRO-3 fills it in later.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: Group) -> Tensor:
        ctx.group = group
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return F.linear(x, weight.flatten(1), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        rows, grad_x, waiting = grad.flatten(0, -2), None, None
        if ctx.needs_input_grad[0]:
            grad_x = matmul_fp32(rows, weight.flatten(1))
            waiting = dist.all_reduce(grad_x, group=ctx.group, async_op=True)  # behind the product below
        of_parameters = _of_parameters(ctx, rows, x, weight)
        if waiting is not None:
            waiting.wait()
            grad_x = cast(Tensor, grad_x).to(grad.dtype).view(*grad.shape[:-1], -1)
        return grad_x, *of_parameters, None


class _Row(torch.autograd.Function):
    """This rank's x (..., I / t) by its columns of such a weight, (O, I / t, ...), summed over ranks, plus bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: Group) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        part = matmul_fp32(x.flatten(0, -2), weight.flatten(1).t())
        dist.all_reduce(part, group=group)
        if not x.is_contiguous():  # to the output of such an input torch's linear adds the bias after rounding
            part = part.to(x.dtype)
        if bias is not None:
            part += bias
        return part.to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad_x = grad @ weight.flatten(1) if ctx.needs_input_grad[0] else None
        return grad_x, *_of_parameters(ctx, grad.flatten(0, -2), x, weight), None


def _of_parameters(ctx: Any, rows: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias from those of the outputs, `rows` (N, O), where they are wanted."""
    grad_weight = (rows.t() @ x.flatten(0, -2)).view_as(weight) if ctx.needs_input_grad[1] else None
    return grad_weight, rows.sum(dim=0) if ctx.needs_input_grad[2] else None


class _Gather(torch.autograd.Function):
    """The last dimension of all ranks side by side; the gradient is this rank's part of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.rank, ctx.width = group.rank(), x.shape[-1]
        everyone = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(everyone, x.contiguous(), group=group)
        return torch.cat(everyone, dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.narrow(-1, ctx.rank * ctx.width, ctx.width).contiguous(), None


# -- convolutions ----------------------------------------------------------------------------------


class ColumnConv(nn.Conv2d):
    """A convolution cut by output channels: a pointwise one, whose input all ranks share, or a depthwise one."""

    group: Group

    def forward(self, input: Tensor) -> Tensor:
        """Channels of this rank (B, C / t, H, W)."""
        if self.groups > 1:
            return super().forward(input)
        return _pointwise(_Column, input, self)


class RowConv(nn.Conv2d):
    """A pointwise convolution cut by input channels, summed over the ranks."""

    group: Group

    def forward(self, input: Tensor) -> Tensor:
        """All channels (B, C, H, W) of this rank's (B, C' / t, H, W)."""
        return _pointwise(_Row, input, self)


def _pointwise(product: Any, input: Tensor, conv: Any) -> Tensor:
    return product.apply(input.permute(0, 2, 3, 1), conv.weight, conv.bias, conv.group).permute(0, 3, 1, 2)


def _conv(kind: type[Any], conv: Any, channels: tuple[int, int], groups: int, group: Group) -> Any:
    """A convolution of `kind` like another, with channels (in, out) of its own and its parameters still to be set."""
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
    outputs = _share(conv.out_channels, group)
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
    made = _conv(RowConv, conv, (_share(conv.in_channels, group), conv.out_channels), 1, group)
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
