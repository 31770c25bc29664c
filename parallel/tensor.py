"""Tensor parallelism: a model's linears, embeddings and convolutions cut over the tensor ranks, by a plan.

The plan says for a class of module how its children are cut: `column` by outputs, `row` by inputs with a sum
behind it, `vocabulary` by the rows of an embedding, `head` by outputs that are gathered again. Children are replaced
in place by modules whose parameters have the same names, so a checkpoint knows nothing of the cut. What no plan
names is whole on every tensor rank and gets the same gradients there; DeepSpeed counts it once (it reads
`tensor_model_parallel` of a parameter).

Linears and embeddings are megatron-core's (0.16.1), imported when something is cut. Written by hand, because
megatron-core has none: the convolutions, and the two collectives around them, whose own are silently wrong on a
tensor that is not contiguous; and the gathering of logits, whose own asks for CUDA.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.boxes import TensorCut

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


def cut(model: nn.Module, holders: Iterable[nn.Module], plan: Plan, group: Group) -> None:
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
            return super().forward(x)[0]

    class Head(Column):
        """The same with the outputs of all ranks."""

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return cast(Tensor, _Gather.apply(super().forward(x), self.tp_group))

    class Row(layers.RowParallelLinear):
        """A linear cut by inputs, summed over the ranks."""

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x)[0]

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


# -- convolutions ----------------------------------------------------------------------------------


class _Copy(torch.autograd.Function):
    """The input of what is cut by outputs: itself; its gradient is the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Sum(torch.autograd.Function):
    """The output of what is cut by inputs: the sum over the ranks; its gradient is itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


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


class ColumnConv(nn.Conv2d):
    """A convolution cut by output channels, of an input that all ranks share; a depthwise one by both."""

    group: Group

    def forward(self, input: Tensor) -> Tensor:
        """Channels of this rank (B, C / t, H, W)."""
        shared = input if self.groups > 1 else cast(Tensor, _Copy.apply(input, self.group))
        return super().forward(shared)


class RowConv(nn.Conv2d):
    """A convolution without bias cut by input channels, summed over the ranks."""

    group: Group

    def forward(self, input: Tensor) -> Tensor:
        """All channels (B, C, H, W) of this rank's (B, C' / t, H, W)."""
        return cast(Tensor, _Sum.apply(super().forward(input), self.group))


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
    outputs = _share(conv.out_channels, group)
    channels = (outputs, outputs) if depthwise else (conv.in_channels, outputs)
    made = _conv(ColumnConv, conv, channels, outputs if depthwise else 1, group)
    made.weight = _shard(conv.weight, 0, parts, group)
    made.bias = None if conv.bias is None else _shard(conv.bias, 0, parts, group)
    return made


def _row_conv(conv: Any, parts: int, group: Group) -> nn.Module:
    if conv.bias is not None or conv.groups > 1:
        raise ValueError("a convolution with a bias or groups cannot be cut by its inputs")
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
