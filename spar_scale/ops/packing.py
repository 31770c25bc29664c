"""Samples of different lengths one after another, without padding: their bounds, and what follows from these.

Legend: B samples, T tokens of all samples, Q query embeddings of each sample, N = T + B Q.

Everything follows from the lengths (B,) and from shapes, on the device, so nothing here waits for the device. The
kernels also want the length of the longest sample on the host, as a bound of their grid: `longest` is the maximum that
a preset allows, not the maximum of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def cumulative(lengths: Tensor) -> Tensor:
    """Return the bounds (B + 1,) int64 of samples of these lengths (B,): 0, then the end of each."""
    return F.pad(lengths.cumsum(0), (1, 0))


def sample_of(lengths: Tensor, total: int) -> Tensor:
    """Return the number of each token's sample (T,) int64; `total` is T, the sum of the lengths (B,)."""
    numbers = torch.arange(len(lengths), device=lengths.device)
    return torch.repeat_interleave(numbers, lengths, output_size=total)


def position_ids(lengths: Tensor, total: int) -> Tensor:
    """Return the position of each token in its sample (T,) int64, from 0."""
    starts = cumulative(lengths)[:-1]
    return torch.arange(total, device=lengths.device) - starts[sample_of(lengths, total)]


def order_behind(lengths: Tensor, total: int, num_queries: int) -> Tensor:
    """Return the order (N,) int64 of all tokens and queries, in which the queries of a sample follow its tokens.

    An entry is the number in the tokens of all samples (T), followed by the queries of all samples (B Q).
    """
    batch, device = len(lengths), lengths.device
    before = torch.arange(batch, device=device) * num_queries  # queries of the samples before
    tokens = torch.arange(total, device=device) + before[sample_of(lengths, total)]
    starts = cumulative(lengths)[1:] + before
    queries = (starts[:, None] + torch.arange(num_queries, device=device)).flatten()
    places = torch.cat([tokens, queries])
    return torch.empty_like(places).scatter_(0, places, torch.arange(len(places), device=device))


@dataclass(frozen=True)
class Packing:
    """The bounds of each sample's queries and keys for packed attention.

    `cu_seqlens_q` and `cu_seqlens_k` (B + 1,), int64 on the device, are the cumulative lengths, from 0. No sample has
    more than `max_q` queries or `max_k` keys.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_q: int
    max_k: int

    @classmethod
    def of(cls, lengths_q: Sequence[int], lengths_k: Sequence[int], device: torch.device | str) -> Packing:
        """Return the packing of samples with these numbers of queries and keys. Raises ValueError if they mismatch."""
        if not lengths_q or len(lengths_q) != len(lengths_k):
            raise ValueError(f"found queries of {len(lengths_q)} samples and keys of {len(lengths_k)}, must be equal")
        if min(*lengths_q, *lengths_k) < 0 or not sum(lengths_q) or not sum(lengths_k):
            raise ValueError(
                f"found {list(lengths_q)} queries and {list(lengths_k)} keys, must not be negative or all zero"
            )
        bounds_q, bounds_k = (cumulative(torch.tensor(lengths, device=device)) for lengths in (lengths_q, lengths_k))
        return cls(bounds_q, bounds_k, max(lengths_q), max(lengths_k))

    @classmethod
    def even(cls, batch: int, num_q: int, num_k: int, device: torch.device) -> Packing:
        """Return the packing of a dense batch."""
        return cls(even_bounds(batch, num_q, device), even_bounds(batch, num_k, device), num_q, num_k)

    @classmethod
    def same(cls, bounds: Tensor, longest: int) -> Packing:
        """Return the packing of self-attention within samples of these bounds (B + 1,)."""
        return cls(bounds, bounds, longest, longest)

    def check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Raise ValueError unless q is (T_q, H, D) and k and v (T_k, H_kv, D) of this packing.

        The number of tokens is compared on the CPU alone: elsewhere it would have to be waited for.
        """
        for name, tensor, bounds in (
            ("q", q, self.cu_seqlens_q),
            ("k", k, self.cu_seqlens_k),
            ("v", v, self.cu_seqlens_k),
        ):
            total = int(bounds[-1]) if bounds.device.type == "cpu" else len(tensor)
            if tensor.ndim != 3 or len(tensor) != total:
                raise ValueError(f"packed {name} is {tuple(tensor.shape)}, must be ({total}, heads, width)")

    def pad(
        self, q: Tensor, k: Tensor, v: Tensor, num_q: int, num_k: int, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pad q, k, v to (B, num_q | num_k, H, D); also return the mask (B, 1, num_q, num_k) of real keys.

        The causal mask is aligned bottom-right.
        """
        (of_q, _), (of_k, real) = _places(self.cu_seqlens_q, num_q), _places(self.cu_seqlens_k, num_k)
        q, k, v = (
            packed.index_select(0, places.flatten()).unflatten(0, places.shape)
            for packed, places in ((q, of_q), (k, of_k), (v, of_k))
        )
        mask = real[:, None, None, :].expand(-1, 1, num_q, -1)
        if causal:
            ahead = (self.cu_seqlens_k.diff() - self.cu_seqlens_q.diff())[:, None, None, None]
            row = torch.arange(num_q, device=q.device)[:, None]
            mask = mask & (torch.arange(num_k, device=q.device) <= row + ahead)
        return q, k, v, mask

    def unpad(self, padded: Tensor) -> Tensor:
        """Return the real queries of (B, num_q, H, D) as (T_q, H, D)."""
        _, real = _places(self.cu_seqlens_q, padded.shape[1])
        return padded.flatten(0, 1).index_select(0, real.flatten().nonzero().flatten())


def _places(bounds: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Return the place (B, number) of each sample's tokens among all, 0 behind its last, and which are real."""
    offsets = torch.arange(number, device=bounds.device)
    real = offsets < bounds.diff()[:, None]
    return torch.where(real, bounds[:-1, None] + offsets, 0), real


def even_bounds(batch: int, length: int, device: torch.device) -> Tensor:
    """Return the bounds (B + 1,) of samples of equal length; created on the device without a copy from the host."""
    return torch.arange(0, (batch + 1) * length, length, device=device)
