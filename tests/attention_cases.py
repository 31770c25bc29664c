"""One table of attention inputs, run by every backend on every device against torch's plain products in fp32.

The reference repeats grouped heads and writes every order out as a boolean mask, sample by sample, so it
shares nothing with the code under test but the softmax.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from spar_scale.ops.attention import attention, use_backend
from spar_scale.ops.packing import Packing

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""Largest difference over the largest value of the reference; bf16 rounds to 4e-3, and sums do so again."""
HEADS, WIDTH = 4, 8
PARTS = ("output", "dq", "dk", "dv")


@dataclass(frozen=True)
class Case:
    """`queries` and `keys` of each sample; `mask` is one of "", "keys", "pairs"; dense unless `packed`."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    heads_k: int = HEADS
    causal: bool = False
    mask: str = ""
    packed: bool = False
    scale: float | None = None


CASES = {
    "plain": Case((5, 5), (5, 5), scale=0.3),
    "cross": Case((3, 3), (5, 5)),
    "grouped": Case((5, 5), (5, 5), heads_k=2),
    "causal": Case((5, 5), (5, 5), causal=True),
    "causal_bottom_right": Case((3, 3), (7, 7), causal=True, heads_k=2),
    "causal_more_queries_than_keys": Case((7, 7), (3, 3), causal=True),
    "mask_of_keys": Case((5, 5, 5), (6, 6, 6), mask="keys"),
    "mask_of_pairs_grouped": Case((5, 5), (6, 6), mask="pairs", heads_k=1),
    "mask_and_causal": Case((3, 3, 3), (6, 6, 6), mask="keys", causal=True),
    "packed": Case((3, 1, 6), (3, 1, 6), packed=True, scale=0.3),
    "packed_causal": Case((3, 1, 6), (3, 1, 6), packed=True, causal=True),
    "prefix_and_queries": Case((4, 4, 4), (11, 4, 7), packed=True, causal=True, heads_k=2),
    "cross_ragged": Case((2, 5, 3), (6, 1, 4), packed=True, heads_k=1),
    "packed_long": Case((3, 60, 6), (3, 60, 6), heads_k=2, packed=True, causal=True),
    "prefix_and_queries_long": Case((4, 4), (70, 5), packed=True, causal=True, heads_k=2),
    "packed_empty_samples": Case((2, 0, 3), (4, 3, 0), packed=True),
}
MASKED = [name for name, case in CASES.items() if case.mask]


def inputs(case: Case, device: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """q, k, v with gradient, the gradient of the output, the mask."""
    generator = torch.Generator().manual_seed(0)
    num_q, num_k = ((sum(case.queries),), (sum(case.keys),))
    if not case.packed:
        num_q, num_k = (len(case.queries), case.queries[0]), (len(case.keys), case.keys[0])
    shapes = [(*num_q, HEADS), (*num_k, case.heads_k), (*num_k, case.heads_k), (*num_q, HEADS)]
    *leaves, upstream = (torch.randn(*shape, WIDTH, generator=generator).to(device, dtype) for shape in shapes)
    mask = None
    if case.mask == "keys":
        mask = torch.rand(len(case.keys), 1, 1, case.keys[0], generator=generator) < 0.6
        mask[1] = False  # the second sample attends to nothing
    elif case.mask == "pairs":
        mask = torch.rand(case.queries[0], case.keys[0], generator=generator) < 0.6
        mask[2] = False  # the third query attends to nothing
    return [leaf.requires_grad_() for leaf in leaves], upstream, None if mask is None else mask.to(device)


def allowed(case: Case, sample: int, mask: Tensor | None) -> Tensor:
    """Which keys a sample's queries see, (queries, keys) on the CPU."""
    num_q, num_k = case.queries[sample], case.keys[sample]
    seen = torch.ones(num_q, num_k, dtype=torch.bool)
    if case.causal:
        seen &= torch.arange(num_k) <= torch.arange(num_q)[:, None] + num_k - num_q
    if mask is not None:
        seen &= (mask[sample, 0] if case.mask == "keys" else mask).cpu()
    return seen


def reference(case: Case, leaves: list[Tensor], upstream: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Output and gradients of q, k, v by MATH in fp32 on the CPU."""
    leaves = [leaf.detach().cpu().float().requires_grad_() for leaf in leaves]
    out = []
    splits = ([leaf.split(sizes) for leaf, sizes in zip(leaves, (case.queries, case.keys, case.keys), strict=True)]
              if case.packed else leaves)  # fmt: skip
    for sample, (q, k, v) in enumerate(zip(*splits, strict=True)):
        k, v = (tensor.repeat_interleave(HEADS // case.heads_k, dim=1) for tensor in (k, v))
        with sdpa_kernel(SDPBackend.MATH):
            done = F.scaled_dot_product_attention(
                *(tensor.transpose(0, 1) for tensor in (q, k, v)),
                attn_mask=allowed(case, sample, mask),
                scale=case.scale,
            )
        out.append(done.transpose(0, 1))
    whole = torch.cat(out) if case.packed else torch.stack(out)
    return [whole.detach(), *torch.autograd.grad(whole, leaves, upstream.cpu().float())]


def found(case: Case, leaves: list[Tensor], upstream: Tensor, mask: Tensor | None, asked: str) -> list[Tensor]:
    """The same by `attention` under the backend `asked`, on the device and in the dtype of the input."""
    q, k, v = leaves
    packing = Packing.of(case.queries, case.keys, q.device) if case.packed else None
    with use_backend(asked, q.device.type, q.dtype):
        out = attention(q, k, v, causal=case.causal, mask=mask, scale=case.scale, packing=packing)
    assert out.shape == q.shape and out.dtype == q.dtype
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def check(name: str, asked: str, device: str, dtype: torch.dtype) -> None:
    """Compare values and gradients; a query without keys gives exactly 0, it and a key without queries no gradient."""
    case = CASES[name]
    leaves, upstream, mask = inputs(case, device, dtype)
    expected = reference(case, leaves, upstream, mask)
    results = found(case, leaves, upstream, mask, asked)
    join = torch.cat if case.packed else torch.stack
    seen = [allowed(case, sample, mask) for sample in range(len(case.queries))]
    query, key = (join([pairs.any(dim) for pairs in seen]) for dim in (1, 0))
    for part, takes_part in enumerate((query, query, key, key)):
        mine, right = results[part].cpu().float(), expected[part]
        difference = float((mine - right).abs().max() / right.abs().max())
        assert difference <= TOLERANCE[dtype], f"{PARTS[part]}: {difference:.1e}"
        assert not mine[~takes_part].any(), f"{PARTS[part]}: not 0 where nothing is attended"
