"""Check that a checkpoint belongs to the current model before anything is loaded.

Ranks have different parameters (pipeline stages, ZeRO parts), so only all ranks together know which keys of a file are
unexpected. This takes one all-reduce of a byte per key. Names are exchanged only if there is a difference.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from parallel.checkpoint.boxes import GlobalTensor
from parallel.checkpoint.manifest import Manifest
from parallel.errors import UserError, nearest
from parallel.launch.agreement import gather_if_any, rank_and_size


def require_same_model(
    path: Path,
    manifest: Manifest,
    requested: dict[str, GlobalTensor],
    kinds: dict[str, str] | None,
    group: dist.ProcessGroup | None,
) -> None:
    """Compare the keys, global shapes and dtypes that all ranks request with those of the checkpoint.

    `kinds` as in `checkpoint.load`. Raises the same UserError, with the first differences, on every rank.
    """
    names = sorted(manifest.keys)
    place = {name: index for index, name in enumerate(names)}
    seen = torch.zeros(len(names), dtype=torch.uint8)
    missing, different = [], {}
    for key, leaf in requested.items():
        record = manifest.keys.get(key)
        if record is None:
            missing.append(key)
            continue
        seen[place[key]] = 1
        dtype = str(next(iter(leaf.pieces.values())).dtype).removeprefix("torch.")
        if record.shape != tuple(leaf.shape) or record.dtype != dtype:
            different[key] = f"{record.dtype} {record.shape} in the file, {dtype} {tuple(leaf.shape)} here"
    if rank_and_size(group)[1] > 1:
        dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=group)
    stored = None if kinds is None else set(kinds.values())
    unexpected = [
        name
        for name, is_requested in zip(names, seen.tolist(), strict=True)
        if not is_requested and (stored is None or manifest.keys[name].kind in stored)
    ]
    by_rank = gather_if_any(group, (missing, different) if missing or different else None)
    if not by_rank and not unexpected:
        return
    all_missing = sorted({key for lost, _ in by_rank.values() for key in lost})
    all_different = {key: text for _, changed in by_rank.values() for key, text in sorted(changed.items())}
    parts = []
    if all_missing:
        hint = nearest(all_missing[0], unexpected or names)
        parts.append(f"{len(all_missing)} missing in it ({_few(all_missing)}{hint})")
    if unexpected:
        parts.append(f"{len(unexpected)} in it that this model does not have ({_few(unexpected)})")
    if all_different:
        texts = [f"{key}: {text}" for key, text in all_different.items()]
        parts.append(f"{len(texts)} with another shape or dtype ({_few(texts)})")
    raise UserError(f"{path}: this checkpoint is of another model: " + "; ".join(parts), everywhere=True)


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
