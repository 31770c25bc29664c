"""Every attention backend of a CUDA machine against plain products in fp32: the table of the CPU's tests."""

from __future__ import annotations

import pytest
import torch
from attention_cases import CASES, MASKED, check, found, inputs

from spar_scale.ops.attention import BACKENDS, BackendRefused, attention, resolve, use_backend, why_not
from spar_scale.ops.packing import Packing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch"),
]

BF16, FP32 = torch.bfloat16, torch.float32
READS_MASKS = ("auto", "math", "sdpa")


def skip_if_absent(asked: str) -> None:
    if asked != "auto" and (refusal := why_not(asked, "cuda", BF16)):
        pytest.skip(f"{asked} {': '.join(refusal)}")


@pytest.mark.parametrize("asked", READS_MASKS)
@pytest.mark.parametrize("name", CASES)
def test_in_fp32(name: str, asked: str):
    check(name, asked, "cuda", FP32)


@pytest.mark.parametrize("asked", ["auto", *BACKENDS])
@pytest.mark.parametrize("name", CASES)
def test_in_bf16(name: str, asked: str):
    skip_if_absent(asked)
    if name in MASKED and asked not in READS_MASKS:
        with pytest.raises(BackendRefused, match="does not support the attention mask"):
            found(CASES[name], *inputs(CASES[name], "cuda", BF16), asked)
    else:
        check(name, asked, "cuda", BF16)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_auto_runs_the_built_in_flash_kernels(packed: bool):
    skip_if_absent("flash")
    assert resolve("cuda", BF16, packed=packed) == ("flash", "torch's built-in kernel")
    q = torch.randn(6, 2, 64, device="cuda", dtype=BF16, requires_grad=True)
    packing = Packing.of([2, 4], [2, 4], "cuda") if packed else None
    q = q if packed else q[None]
    names, queue = set(), [attention(q, q, q, causal=True, packing=packing).grad_fn]
    while queue:
        if (node := queue.pop()) is not None:
            names.add(node.name())
            queue += [parent for parent, _ in node.next_functions]
    kernel = "varlen_attn" if packed else "ScaledDotProductFlashAttention"
    assert any(kernel in name for name in names), names


def test_packed_attention_never_waits_for_the_device():
    packing = Packing.of([2, 4], [3, 4], "cuda")
    q, k = (torch.randn(tokens, 2, 64, device="cuda", dtype=BF16, requires_grad=True) for tokens in (6, 7))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for asked in ("auto", "sdpa"):
            with use_backend(asked, "cuda", BF16):
                attention(q, k, k, causal=True, packing=packing).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
