"""The attention entry point against plain products."""

import logging

import pytest
import torch

from spar_scale.ops.attention import attention, resolve


def plain(q, k, v, allowed, scale):
    """softmax(q k^T scale) v with a boolean mask (N_q, N_k), heads repeated, in fp64."""
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * scale
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v.double())


@pytest.mark.parametrize("num_q, num_k", [(5, 5), (3, 5)])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_matches_plain_products(num_q, num_k, kv_heads, causal, masked):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, num_q, 4, 8, generator=generator)
    k, v = (torch.randn(2, num_k, kv_heads, 8, generator=generator) for _ in range(2))
    allowed = torch.ones(num_q, num_k, dtype=torch.bool)
    mask = None
    if masked:
        mask = torch.ones(num_q, num_k, dtype=torch.bool)
        mask[:, 1] = False
        allowed &= mask
    if causal:  # bottom-right: the last query sees all keys
        allowed &= torch.arange(num_k)[None] <= torch.arange(num_q)[:, None] + num_k - num_q
    out = attention(q, k, v, causal=causal, mask=mask, scale=0.3)
    torch.testing.assert_close(out.double(), plain(q, k, v, allowed, 0.3), atol=1e-6, rtol=1e-5)


def test_bf16_on_cpu_takes_plain_products_and_says_so_once(caplog):
    resolve.cache_clear()
    with caplog.at_level(logging.INFO, logger="spar_scale.ops.attention"):
        q = torch.randn(1, 4, 2, 8, dtype=torch.bfloat16, requires_grad=True)
        attention(q, q, q)
        out = attention(q, q, q)
    lines = [record.message for record in caplog.records]
    assert lines == ["attention on cpu in bfloat16: math (the backward of flash attention in bf16 is slow on CPU)"]
    names, queue = set(), [out.grad_fn]
    while queue:
        if (node := queue.pop()) is not None:
            names.add(node.name())
            queue += [parent for parent, _ in node.next_functions]
    assert not any("Flash" in name for name in names), names
    assert any("Softmax" in name for name in names), names


def test_fp32_is_left_to_torch():
    assert resolve("cpu", torch.float32)[0] == "sdpa"
