"""Pack samples of different lengths one after another, for attention without padding.

Legend: B samples, T tokens of all samples, N tokens of the longest sample, H heads, D head width. Queries and keys have
separate lengths, so that for example the queries of a sample can attend to its prefix and to themselves. The lengths
are known on the host, so nothing here synchronises with the device. A packing is created once per batch and used by
every layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Packing:
    """The bounds of each sample's queries and keys; create it with `of`.

    `cu_seqlens_q` and `cu_seqlens_k` (B + 1,), int32 on the device, are the cumulative lengths, from 0.
    """

    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor

    @classmethod
    def of(cls, lengths_q: Sequence[int], lengths_k: Sequence[int], device: torch.device | str) -> Packing:
        """Return the packing of samples with these numbers of queries and keys. Raises ValueError if they mismatch."""
        if not lengths_q or len(lengths_q) != len(lengths_k):
            raise ValueError(f"found queries of {len(lengths_q)} samples and keys of {len(lengths_k)}, must be equal")
        if min(*lengths_q, *lengths_k) < 0 or not sum(lengths_q) or not sum(lengths_k):
            raise ValueError(
                f"found {list(lengths_q)} queries and {list(lengths_k)} keys, must not be negative or all zero"
            )
        cumulative = (
            torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
            for lengths in (lengths_q, lengths_k)
        )
        return cls(tuple(lengths_q), tuple(lengths_k), *cumulative)

    @classmethod
    def even(cls, batch: int, num_q: int, num_k: int, device: torch.device) -> Packing:
        """Return the packing of a dense batch; created on the device without a copy from the host."""
        cumulative = (
            torch.arange(0, (batch + 1) * num, num, dtype=torch.int32, device=device) for num in (num_q, num_k)
        )
        return cls((num_q,) * batch, (num_k,) * batch, *cumulative)

    @property
    def max_q(self) -> int:
        """Queries of the longest sample."""
        return max(self.lengths_q)

    @property
    def max_k(self) -> int:
        """Keys of the longest sample."""
        return max(self.lengths_k)

    def check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Raise ValueError unless q is (T_q, H, D) and k and v (T_k, H_kv, D) of this packing."""
        for name, tensor, lengths in (("q", q, self.lengths_q), ("k", k, self.lengths_k), ("v", v, self.lengths_k)):
            if tensor.ndim != 3 or len(tensor) != sum(lengths):
                raise ValueError(f"packed {name} is {tuple(tensor.shape)}, must be ({sum(lengths)}, heads, width)")

    def pad(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pad q, k, v to (B, N, H, D); also return the mask (B, 1, N_q, N_k) of real keys, optionally causal.

        The causal mask is aligned bottom-right.
        """
        q, k, v = (
            pad_sequence(list(tensor.split(lengths)), batch_first=True)
            for tensor, lengths in ((q, self.lengths_q), (k, self.lengths_k), (v, self.lengths_k))
        )
        num_q, num_k = (cumulative.diff()[:, None, None, None] for cumulative in (self.cu_seqlens_q, self.cu_seqlens_k))
        row = torch.arange(self.max_q, device=q.device)[:, None]
        column = torch.arange(self.max_k, device=q.device)
        mask = column < num_k
        mask = mask & (column <= row + num_k - num_q) if causal else mask.expand(-1, -1, self.max_q, -1)
        return q, k, v, mask

    def unpad(self, padded: Tensor) -> Tensor:
        """Return the real queries of (B, N_q, H, D) as (T_q, H, D)."""
        return torch.cat([sample[:length] for sample, length in zip(padded, self.lengths_q, strict=True)])
