"""Tensor parallelism: what a plan cuts computes what the whole does, and what cannot be cut is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.models.transformers.sana_transformer import GLUMBConv
from launching import preload, run_world
from nano import NANO
from torch import Tensor, nn

from parallel.errors import UserError
from parallel.tensor import ModulePlan, Plan, Split, apply_tensor_parallel
from spar_scale.models.blocks import TransformerLayer
from spar_scale.models.sharding import check_tensor, tensor_plan

preload("spar_scale.models.sharding", "megatron.core.tensor_parallel.layers")


class Speech(nn.Module):
    """An embedding, and a head whose outputs are gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(12, 8), nn.Linear(8, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.words(tokens))


PLAN = tensor_plan(NANO)
SPEECH: Plan = {Speech: ModulePlan({"words": Split("vocabulary"), "head": Split("head")})}
CASES = {
    "transformer layer": lambda: (TransformerLayer(16, 4), torch.randn(2, 5, 16)),
    "gated convolutions": lambda: (GLUMBConv(8, 8, 2.5, residual_connection=False), torch.randn(2, 8, 3, 3)),
    "not contiguous": lambda: (
        GLUMBConv(8, 8, 2.5, residual_connection=False), torch.randn(2, 3, 3, 8).permute(0, 3, 1, 2),
    ),
    "words": lambda: (Speech(), torch.randint(12, (2, 5))),
}  # fmt: skip


def everyone() -> torch.distributed.ProcessGroup:
    group = torch.distributed.group.WORLD
    assert group is not None
    return group


def gradients(module: nn.Module, given: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of the input and of all parameters, for a loss that sees every place."""
    given = given.detach().clone(memory_format=torch.preserve_format)
    given.requires_grad_(given.is_floating_point())
    out = module(given)
    out.pow(2).mul(torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    found = {name: parameter.grad for name, parameter in module.named_parameters()} | {"in": given.grad}
    return {"out": out.detach(), **{name: grad for name, grad in found.items() if grad is not None}}


def compare(rank: int, world: int, name: str) -> tuple[float, dict[str, float]]:
    """The largest relative difference from the whole module, and each parameter's share of the whole."""
    torch.manual_seed(0)
    module, given = CASES[name]()
    whole, group = copy.deepcopy(module), everyone()
    holder = nn.ModuleList(module.children())  # as a list of layers refers to the parts of a model
    apply_tensor_parallel(module, [holder], {**PLAN, **SPEECH}, group)
    assert list(map(id, holder)) == list(map(id, module.children()))
    expected, found = gradients(whole, given), gradients(module, given)
    parameters, worst, shares = dict(module.named_parameters()), 0.0, {}
    floor = 1e-2 * max(float(value.abs().max()) for value in expected.values())  # a key's bias has no gradient
    assert set(found) == set(expected)
    for key, value in expected.items():
        parameter = parameters.get(key)
        place = getattr(parameter, "tensor_cut", None)
        if parameter is not None:
            shares[key] = parameter.numel() / value.numel()
            assert bool(getattr(parameter, "tensor_model_parallel", False)) == (place is not None)
        if place is not None:
            assert place.global_shape == tuple(value.shape)
            value = torch.cat([value.narrow(place.dim, start, length) for start, length in place.segments], place.dim)
        worst = max(worst, float((found[key] - value).abs().max() / value.abs().max().clamp_min(floor)))
    return worst, shares


@pytest.mark.parametrize("name", CASES)
def test_what_is_cut_computes_what_the_whole_does(name: str) -> None:
    for worst, shares in run_world(2, compare, name):
        assert worst < 1e-5
        assert 0.5 in shares.values(), "nothing was cut"


def exact_weight_gradients(module: nn.Module) -> dict[str, Tensor]:
    """Weight gradients of pointwise convolutions as the next backward pass fills them in: summed in fp64, rounded once.

    torch's own (2.13) are no reference everywhere: on a CPU without AVX-512 it rounds the gradient of each image to
    bf16 before it adds them up, and a third of the numbers differ.
    """
    found: dict[str, Tensor] = {}

    def watch(name: str, conv: nn.Conv2d) -> None:
        inputs: list[Tensor] = []

        def add_up(_: nn.Module, __: object, grad_output: Any) -> None:
            total = torch.einsum("bohw,bihw->oi", grad_output[0].double(), inputs[0].double())
            found[f"{name}.weight"] = total.to(conv.weight.dtype).view_as(conv.weight)

        conv.register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach()))
        conv.register_full_backward_hook(add_up)

    for name, child in module.named_modules():
        if isinstance(child, nn.Conv2d) and child.kernel_size == (1, 1):
            watch(name, child)
    return found


def agreement(rank: int, world: int, name: str) -> dict[str, float]:
    """In bf16: the share of numbers, of the output and of each gradient, that are those of the whole to the bit."""
    torch.manual_seed(0)
    module, given = CASES[name]()
    module = module.bfloat16()
    given = given.bfloat16() if given.is_floating_point() else given
    whole = copy.deepcopy(module)
    apply_tensor_parallel(module, [], {**PLAN, **SPEECH}, everyone())
    exact = exact_weight_gradients(whole)
    expected, found = gradients(whole, given) | exact, gradients(module, given)
    parameters = dict(module.named_parameters())
    for key, value in expected.items():
        if place := getattr(parameters.get(key), "tensor_cut", None):
            value = torch.cat([value.narrow(place.dim, start, length) for start, length in place.segments], place.dim)
            expected[key] = value
    return {key: float((found[key] == value).float().mean()) for key, value in expected.items()}


@pytest.mark.parametrize("name", ["transformer layer", "not contiguous", "words"])  # as the diffusion transformer's are
def test_in_bf16_what_is_cut_is_rounded_where_the_whole_is(name: str) -> None:
    """With parts that are rounded before they are added .1 to .9 of the numbers are others."""
    for shares in run_world(2, agreement, name):
        print(name, {key: round(share, 3) for key, share in shares.items()})
        assert min(shares.values()) > 0.98


def refuse(rank: int, world: int) -> str:
    group = everyone()
    with pytest.raises(ValueError, match=r"^attention\.query: ") as error:
        plan = {**PLAN, TransformerLayer: ModulePlan({})}
        layer = TransformerLayer(15, 3)
        apply_tensor_parallel(layer, [], plan, group)
    return str(error.value)


def test_a_size_that_does_not_divide_is_named() -> None:
    assert set(run_world(2, refuse)) == {"attention.query: 15 is not divisible by tensor 2"}


def test_a_preset_says_which_cuts_fit() -> None:
    check_tensor(NANO, 1)
    check_tensor(NANO, 2)
    rule = "preset 'nano' has language.key_value_heads 2, which it must divide"
    with pytest.raises(UserError) as error:
        check_tensor(NANO, 3)
    assert (
        str(error.value)
        == f"parallel.tensor: found 3; {rule}; nearest that fit: parallel.tensor=2 or parallel.tensor=1"
    )
