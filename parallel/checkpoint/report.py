"""Describe and verify checkpoints for the user. Reads no tensors and does not import torch."""

from __future__ import annotations

import math
from pathlib import Path

from parallel.checkpoint.manifest import MANIFEST, Manifest, check_files, list_checkpoints, read_manifest, references
from parallel.errors import UserError


def inspect(path: Path) -> str:
    """Describe the checkpoints of a run directory, of its checkpoints directory, or one checkpoint.

    Raises UserError if there is none or a manifest is damaged. Only `verify` hashes the files.
    """
    return "\n".join(_describe(folder, read_manifest(folder)) for folder in _checkpoints(path))


def verify(path: Path) -> str:
    """Hash every file of the checkpoints at `path` and return a report. Raises UserError that lists damaged ones."""
    lines, problems = [], []
    for folder in _checkpoints(path):
        try:
            manifest = read_manifest(folder)
            check_files(folder, manifest)
        except UserError as error:
            problems.append(str(error))
        else:
            total = sum(record.bytes for record in manifest.files.values())
            lines.append(f"{folder}: intact ({len(manifest.files)} files, {_size(total)})")
    if problems:
        raise UserError("\n".join([*problems, *lines]))
    return "\n".join(lines)


def _checkpoints(path: Path) -> list[Path]:
    if (path / MANIFEST).exists() or path.name.startswith("step-"):
        if not path.is_dir():
            raise UserError(f"{path}: no such checkpoint")
        return [path]
    for root in (path, path / "checkpoints"):
        if found := list_checkpoints(root):
            return found
    raise UserError(f"{path}: no checkpoints here; give a run directory, its checkpoints directory or one checkpoint")


def _describe(folder: Path, manifest: Manifest) -> str:
    kinds: dict[str, list[int]] = {}
    for record in manifest.keys.values():
        kinds.setdefault(record.kind or "whole tensors", []).append(math.prod(record.shape))
    lines = [f"{folder}", f"  step {manifest.step}, {_size(sum(record.bytes for record in manifest.files.values()))}"]
    lines += [f"  {kind}: {len(counts)} tensors, {sum(counts):,} elements" for kind, counts in sorted(kinds.items())]
    for name, value in manifest.state.items():
        lines.append(f"  {name}: {_short(value)}")
    if names := references(folder):
        lines.append(f"  referred to by: {', '.join(names)}")
    return "\n".join(lines)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _size(num_bytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
