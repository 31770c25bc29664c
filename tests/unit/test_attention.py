"""The attention entry point: every backend of this machine against plain products, the choice, the refusals."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
import torch.distributed as dist
from attention_cases import CASES, MASKED, check, inputs, reference
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface

from parallel.errors import UserError
from spar_scale.config.recipe import Recipe, load_recipe, may_change_at_resume
from spar_scale.ops.attention import BACKENDS, BackendRefused, _log_once, attention, resolve, use_backend
from spar_scale.ops.packing import Packing, cumulative, order_behind, position_ids, sample_of
from spar_scale.ops.transformers_attention import IMPLEMENTATION
from spar_scale.training.attention_choice import attention_of
from spar_scale.training.trainer import train

ROOT = Path(__file__).resolve().parents[2]
HERE = ("math", "sdpa", "flash")
PACKAGES = [name for name in BACKENDS if name not in HERE]
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What is logged once is logged once in each test."""
    for function in (resolve, _log_once):
        function.cache_clear()
    yield
    resolve.cache_clear()


@pytest.mark.parametrize("asked", ["auto", *HERE])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_plain_products(name: str, asked: str, dtype: torch.dtype):
    check(name, asked, "cpu", dtype)


def test_the_reference_is_the_formula():
    """softmax(q k^T scale) v written out in fp64, on a case with grouped heads and a mask of pairs."""
    case = CASES["mask_of_pairs_grouped"]
    leaves, upstream, mask = inputs(case, "cpu", FP32)
    assert mask is not None
    q, k, v = (leaf.detach().double() for leaf in leaves)
    scores = torch.einsum("bqhd,bkd->bhqk", q, k[:, :, 0]) * 8**-0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num(0)
    expected = torch.einsum("bhqk,bkd->bqhd", weights, v[:, :, 0])
    torch.testing.assert_close(reference(case, leaves, upstream, mask)[0].double(), expected, atol=1e-6, rtol=1e-5)


def kernels(out: torch.Tensor) -> set[str]:
    """The names of the backward nodes behind a tensor."""
    names, queue = set(), [out.grad_fn]
    while queue:
        if (node := queue.pop()) is not None:
            names.add(node.name())
            queue += [parent for parent, _ in node.next_functions]
    return names


@pytest.mark.parametrize(
    ("asked", "dtype", "flash"),
    [("auto", FP32, True), ("auto", BF16, False), ("math", FP32, False), ("flash", FP32, True), ("flash", BF16, True)],
)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_the_kernel_that_runs_is_the_one_that_was_chosen(asked: str, dtype: torch.dtype, flash: bool, packed: bool):
    q = torch.randn(*([4] if packed else [1, 4]), 2, 8, dtype=dtype, requires_grad=True)
    with use_backend(asked, "cpu", dtype):
        names = kernels(attention(q, q, q, packing=Packing.of([1, 3], [1, 3], "cpu") if packed else None))
    assert any("Flash" in name for name in names) is flash, names
    assert any("Softmax" in name for name in names) is not flash, names


def test_each_choice_is_said_once_with_its_reason(caplog: pytest.LogCaptureFixture):
    packing = Packing.of([1, 3], [1, 3], "cpu")
    with caplog.at_level(logging.INFO, logger="spar_scale.ops.attention"):
        for _ in range(2):
            q = torch.randn(1, 4, 2, 8, dtype=BF16)
            with use_backend("auto", "cpu", BF16):
                attention(q, q, q)
            attention(q[0].float(), q[0].float(), q[0].float(), packing=packing)
    assert [record.message for record in caplog.records] == [
        "attention on cpu in bfloat16: math (the backward pass of flash attention in bf16 is slow on CPU)",
        "attention on cpu in float32, packed: sdpa (torch selects one of its kernels on cpu; "
        "sdpa has no packed kernel on cpu: short packed samples are padded, others run one by one)",
    ]


GPUS = [
    ((9, 0), FP32, False, "sdpa", "flash does not compute in float32"),
    ((9, 0), BF16, False, "flash", "torch's built-in kernel"),
    ((9, 0), BF16, True, "sdpa", "flash does not support the attention mask"),
    ((7, 5), BF16, False, "sdpa", "flash needs a GPU of compute capability 8.0, found 7.5"),
]


@pytest.mark.parametrize(("capability", "dtype", "masked", "backend", "reason"), GPUS)
def test_on_cuda_the_built_in_flash_is_taken_where_it_can(capability, dtype, masked, backend, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    for packed in (False, True):
        found, why = resolve("cuda", dtype, masked=masked, packed=packed)
        assert found == backend and reason in why
        assert ("short packed samples are padded" in why) is (packed and backend == "sdpa")


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_on_cuda_unequal_lengths_in_causal_order_go_to_the_packed_kernel(packed: bool, monkeypatch):
    """Its dense kernel reads no mask and would align them top-left. Shapes alone: nothing is computed without a GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append((func.name(), args))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode():
        q, k = (torch.empty(2, num, heads, 8, device="cuda", dtype=BF16) for num, heads in ((3, 4), (7, 2)))
        packing = Packing.of([2, 4], [5, 9], "cuda") if packed else None
        if packed:
            q, k = q.flatten(0, 1), k.flatten(0, 1)
        with Record():
            assert attention(q, k, k, causal=True, scale=0.3, packing=packing).shape == q.shape
    [args] = [args for name, args in calls if name == "torch_attn::_varlen_attn"]
    longest, causal, scale, window, grouped = args[5:7], args[7], args[8], args[9], args[10]
    assert (longest, causal, scale, window) == ((4, 9) if packed else (3, 7), True, 0.3, [-1, 0]) and grouped
    assert not any("softmax" in name for name, _ in calls)


def stand_in(returns_logsumexp: bool, calls: list[str]) -> SimpleNamespace:
    """A flash-attn package on the CPU: the published names and keywords, computed by `math`."""

    def flash_attn_func(q, k, v, *, softmax_scale=None, causal=False):
        calls.append("dense")
        with use_backend("math", "cpu", q.dtype):
            out = attention(q, k, v, scale=softmax_scale, causal=causal)
        return (out, None) if returns_logsumexp else out

    def flash_attn_varlen_func(
        q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False
    ):
        calls.append("packed")
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        packing = Packing.of(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), "cpu")
        assert (max_seqlen_q, max_seqlen_k) == (packing.max_q, packing.max_k)
        with use_backend("math", "cpu", q.dtype):
            out = attention(q, k, v, scale=softmax_scale, causal=causal, packing=packing)
        return (out, None) if returns_logsumexp else out

    return SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)


@pytest.mark.parametrize("asked", PACKAGES)
@pytest.mark.parametrize("name", [name for name in CASES if name not in MASKED])
def test_a_package_is_called_by_its_published_names(name: str, asked: str, monkeypatch):
    module = {"flash_attn_2": "flash_attn", "flash_attn_3": "flash_attn_interface", "flash_attn_4": "flash_attn.cute"}
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    calls: list[str] = []
    monkeypatch.setitem(sys.modules, module[asked], stand_in(asked == "flash_attn_4", calls))
    monkeypatch.setattr("spar_scale.ops.attention.why_not", lambda *_: None)  # as on a GPU
    check(name, asked, "cpu", FP32)
    assert calls == ["packed" if CASES[name].packed else "dense"]


INSTALL = {
    "flash_attn_2": ("flash_attn:", "pip install flash-attn --no-build-isolation"),
    "flash_attn_3": ("flash_attn_interface:", "hopper/ of Dao-AILab/flash-attention"),
    "flash_attn_4": ("flash_attn.cute:", "pip install 'flash-attn-4>=4.0.0b36'"),
}


@pytest.mark.parametrize("asked", PACKAGES)
def test_an_absent_package_is_refused_with_the_way_to_install_it(asked: str):
    with pytest.raises(BackendRefused) as refusal:
        resolve("cuda", BF16, requested=asked)
    for text in (f"{asked} is not installed", *INSTALL[asked], "or choose auto"):
        assert text in str(refusal.value)


def test_flash_attn_4_alone_is_not_taken_for_flash_attn_2(tmp_path: Path):
    """It leaves a `flash_attn` behind that imports, without the functions of version 2."""
    (tmp_path / "flash_attn/cute").mkdir(parents=True)
    (tmp_path / "flash_attn/cute/__init__.py").write_text(
        "def flash_attn_func(): ...\ndef flash_attn_varlen_func(): ..."
    )
    code = (
        "import torch\nfrom spar_scale.ops.attention import why_not\n"
        "torch.cuda.get_device_capability = lambda: (9, 0)\n"
        "for name in ('flash_attn_2', 'flash_attn_4'): print(name, why_not(name, 'cuda', torch.bfloat16))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    two, four = done.stdout.splitlines()
    assert "is not installed (flash_attn: AttributeError" in two and "has no attribute 'flash_attn_func'" in two
    assert four == "flash_attn_4 None"


REFUSALS = [
    (
        "flash_attn_2",
        "cpu",
        BF16,
        False,
        ["runs on CUDA only, found cpu", "choose math, sdpa or flash, or choose auto"],
    ),
    ("flash", "cuda", FP32, False, ["flash does not compute in float32", "set precision to bf16, or choose auto"]),
    ("flash", "cuda", BF16, True, ["flash does not support the attention mask", "choose sdpa, or choose auto"]),
    ("flash_attn_3", "cuda", BF16, True, ["flash_attn_3 does not support the attention mask"]),
    ("flesh", "cpu", FP32, False, ["found 'flesh', must be auto or one of math, sdpa, flash, flash_attn_2"]),
]


@pytest.mark.parametrize(("asked", "device", "dtype", "masked", "expected"), REFUSALS)
def test_what_a_backend_cannot_do_is_refused_with_what_would_help(asked, device, dtype, masked, expected):
    with pytest.raises(BackendRefused) as refusal:
        resolve(device, dtype, masked=masked, requested=asked)
    for text in expected:
        assert text in str(refusal.value)


def test_a_backend_is_asked_for_only_as_long_as_the_context_lasts():
    q = torch.randn(1, 4, 2, 8, requires_grad=True)
    with use_backend("math", "cpu", FP32):
        with pytest.raises(BackendRefused), use_backend("flash_attn_2", "cpu", FP32):
            pass
        assert any("Softmax" in name for name in kernels(attention(q, q, q)))
    assert any("Flash" in name for name in kernels(attention(q, q, q)))


BAD_INPUT = [
    ({"mask": torch.zeros(4, 4)}, "attention mask: found torch.float32, must be bool"),
    ({"packing": Packing.of([1, 2], [1, 2], "cpu")}, r"packed q is \(1, 4, 2, 8\), must be \(3, heads, width\)"),
    ({"packing": Packing.of([1], [1], "cpu"), "mask": torch.ones(4, 4).bool()}, "packed attention takes no mask"),
]


@pytest.mark.parametrize(("given", "message"), BAD_INPUT)
def test_input_that_does_not_fit_is_refused(given: dict, message: str):
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match=message):
        attention(q, q, q, **given)


@pytest.mark.parametrize("lengths", [([], []), ([1], [1, 2]), ([1, -1], [1, 2]), ([0, 0], [1, 2])])
def test_lengths_that_make_no_packing_are_refused(lengths: tuple[list[int], list[int]]):
    with pytest.raises(ValueError, match=r"must be equal|must not be negative or all zero"):
        Packing.of(*lengths, "cpu")


def test_the_even_packing_is_that_of_its_lengths():
    even, of = Packing.even(3, 2, 5, torch.device("cpu")), Packing.of([2] * 3, [5] * 3, "cpu")
    assert (even.max_q, even.max_k) == (of.max_q, of.max_k)
    assert torch.equal(even.cu_seqlens_q, of.cu_seqlens_q) and torch.equal(even.cu_seqlens_k, of.cu_seqlens_k)
    assert even.cu_seqlens_q.dtype == of.cu_seqlens_q.dtype == torch.int64


@pytest.mark.parametrize("given", [{"dropout": 0.1}, {"sliding_window": 4}])
def test_what_a_model_of_transformers_asks_for_beyond_is_refused(given: dict):
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="dropout and sliding window are not supported"):
        AttentionInterface()[IMPLEMENTATION](nn.Module(), q, q, q, None, **given)


LENGTHS = ([3, 1, 4], [1, 1, 1], [5])


@pytest.mark.parametrize("lengths", LENGTHS)
def test_what_follows_from_the_lengths_is_what_a_loop_over_the_samples_gives(lengths: list[int]):
    queries, total, given = 2, sum(lengths), torch.tensor(lengths)
    numbers = [(sample, place) for sample, length in enumerate(lengths) for place in range(length)]
    assert sample_of(given, total).tolist() == [sample for sample, _ in numbers]
    assert position_ids(given, total).tolist() == [place for _, place in numbers]
    together = []
    for sample, length in enumerate(lengths):
        together += [numbers.index((sample, place)) for place in range(length)]
        together += [total + sample * queries + query for query in range(queries)]
    assert order_behind(given, total, queries).tolist() == together
    assert cumulative(given).tolist() == [sum(lengths[:end]) for end in range(len(lengths) + 1)]


def recipe_of(tmp_path: Path, *overrides: str) -> Recipe:
    run_dir = f"run_dir={tmp_path / 'run'}"
    return load_recipe(ROOT / "recipes/tiny/tokenizer_init.yaml", [run_dir, "parallel.zero=1", *overrides])


def test_the_names_of_the_recipe_are_those_of_the_resolver():
    assert get_args(Recipe.model_fields["attention"].annotation) == ("auto", *BACKENDS)
    assert may_change_at_resume("attention")


def test_training_refuses_an_absent_backend_before_anything_is_built(tmp_path: Path):
    with pytest.raises(UserError, match=r"^attention: flash_attn_2 .*or choose auto") as refusal:
        train(recipe_of(tmp_path, "attention=flash_attn_2"))
    assert refusal.value.everywhere and not dist.is_initialized() and not (tmp_path / "run").exists()


def test_the_recipes_backend_holds_for_the_run_and_a_refusal_within_names_its_key(tmp_path: Path):
    q = torch.randn(1, 4, 2, 8, requires_grad=True)
    with attention_of(recipe_of(tmp_path, "attention=math")):
        assert any("Softmax" in name for name in kernels(attention(q, q, q)))
    with (
        pytest.raises(UserError, match=r"^attention: flash does not support the attention mask") as refusal,
        attention_of(recipe_of(tmp_path)),
    ):
        resolve("cuda", BF16, masked=True, requested="flash")
    assert not refusal.value.everywhere
