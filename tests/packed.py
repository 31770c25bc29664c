"""Prompts of a batch one after another, as the loader packs them, and what is of each sample."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

TOKENS = ("tokens", "counts")


def packed(prompts: Iterable[Sequence[int]]) -> dict[str, Tensor]:
    """The slots `tokens` and `lengths` of prompts."""
    rows = [torch.tensor(list(prompt), dtype=torch.int64) for prompt in prompts]
    return {"tokens": torch.cat(rows), "lengths": torch.tensor([len(row) for row in rows])}


def samples(batch: dict[str, Any], packed_slots: Sequence[str] = TOKENS) -> list[dict[str, Tensor]]:
    """Each sample of a batch: its tensors, without the batch's dimension."""
    lengths = batch["lengths"].tolist()
    parts = {
        name: value.split(lengths) if name in packed_slots else value.unbind()
        for name, value in batch.items()
        if isinstance(value, Tensor)
    }
    return [{name: values[row] for name, values in parts.items()} for row in range(len(lengths))]


def batch_of(rows: Iterable[dict[str, Tensor]], packed_slots: Sequence[str] = TOKENS) -> dict[str, Tensor]:
    """The batch of such samples."""
    rows = list(rows)
    return {
        name: torch.cat([row[name] for row in rows])
        if name in packed_slots
        else torch.stack([row[name] for row in rows])
        for name in rows[0]
    }
