"""Checkpoints: sharded, atomic, and loadable under any layout.

Every rank writes only the boxes that it owns, under global names, so a checkpoint loads under any layout and a plain
`dcp.load` reads it. The steps of a save: a temporary directory; the tensors; every rank reads its file back and
compares hashes; the manifest; a rename; `latest`. A save that is killed leaves the earlier checkpoints unchanged. A
load first verifies the hashes, divided among the ranks, before it parses anything; it never executes code from a file.

    root/step-00000100/{__0_0.distcp, __1_0.distcp, ..., .metadata, manifest.json}    root/latest

The costs: a save reads back what it wrote (from the page cache), and a resume reads every file one extra time. Keys are
`{kind}.{parameter}` with the kinds model (fp32 master weights), exp_avg, exp_avg_sq, momentum_buffer, ema; whole
tensors (such as a discriminator's) keep their names. All ranks of `group` (gloo; None: the default group) must call
`save`, `load` and `find` together.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from parallel.checkpoint.boxes import BoxLoadPlanner, BoxSavePlanner, Fragment, GlobalTensor, leaves, whole
from parallel.checkpoint.manifest import (
    FileRecord,
    KeyRecord,
    Manifest,
    check_files,
    check_json,
    list_checkpoints,
    manifest_hash,
    protect,
    read_manifest,
    references,
    sha256_of,
    step_name,
    step_of,
)
from parallel.checkpoint.report import inspect, verify
from parallel.checkpoint.same_model import require_same_model
from parallel.checkpoint.storage import BoxReader, BoxWriter
from parallel.errors import UserError
from parallel.files import remove_temporaries, sync_directory, write_file
from parallel.launch.agreement import gather_if_any, rank_and_size, run_on_all_ranks, run_on_first_rank

__all__ = ["find", "inspect", "load", "manifest_hash", "protect", "read", "remove_leftovers", "save", "verify"]

Group = dist.ProcessGroup | None
_LEFTOVER = ".tmp-"
LATEST = "latest"  # a file with the name of the newest checkpoint, for users; the program does not read it
_log = logging.getLogger(__name__)


def save(
    root: Path,
    step: int,
    fragments: Iterable[Fragment],
    state: dict[str, Any],
    tensors: dict[str, Tensor],
    group: Group,
    keep: int,
) -> Path:
    """Write `root/step-...`, return its path, and prune: afterwards at most `keep` checkpoints exist.

    `state` (JSON; that of the first rank is used) is stored in the manifest. `tensors` are whole tensors: each is
    written by the lowest rank that passes it. Pruning removes the oldest checkpoints, and those newer than `step` (from
    a lineage that was replaced), but never one that another run refers to (`protect`).

    Raises on every rank: UserError (file and cause) if something cannot be written; then the temporary directory is
    removed and the earlier checkpoints are unchanged. ValueError if the fragments leave a gap or overlap.
    """
    final, temporary = root / step_name(step), root / f"{_LEFTOVER}{step_name(step)}"
    run_on_first_rank(group, lambda: _prepare(root, final, temporary, state))
    try:
        run_on_all_ranks(group, lambda: _require_visible(temporary))
        files, keys = _write(temporary, list(fragments), tensors, group)
        run_on_first_rank(group, lambda: _commit(Manifest(step, files, keys, state), temporary, final))
    except Exception:
        if rank_and_size(group)[0] == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    run_on_first_rank(group, lambda: _prune(root, step, keep))
    return final


def load(
    path: Path,
    fragments: Iterable[Fragment],
    tensors: dict[str, Tensor],
    group: Group,
    kinds: dict[str, str] | None = None,
    verify: bool = True,
) -> dict[str, Any]:
    """Load the checkpoint `path` into the views, in place, and return its state.

    Without `kinds`, the checkpoint must hold exactly the keys that the fragments and tensors of all ranks request. With
    `kinds` (kind of the fragments -> kind in the files, e.g. {"model": "ema", "ema": "ema"}), only those kinds are
    read; other kinds and whole tensors that no rank requests are ignored. Use `verify=False` only for a path that
    `find` has just returned.

    Raises the same UserError on every rank if a file is damaged or the checkpoint belongs to another model.
    """
    fragments = list(fragments)
    manifest = run_on_all_ranks(group, lambda: _verified(path, group) if verify else read_manifest(path))
    requested = leaves(fragments, tensors, saving=False, kinds=kinds)
    require_same_model(path, manifest, requested, kinds, group)
    _read_into(path, manifest, requested, group)
    if kinds is not None:
        _copy_shared_kinds(fragments, kinds)
    return manifest.state


def find(root: Path, group: Group = None) -> Path | None:
    """Return the newest intact checkpoint in `root`, or None if there are no checkpoints.

    Logs a warning with the reason for each newer damaged one. Raises UserError if all are damaged.
    """
    problems: list[str] = []
    for name in run_on_first_rank(group, lambda: [path.name for path in list_checkpoints(root)]):
        path = root / name
        try:
            run_on_all_ranks(group, lambda path=path: _verified(path, group))
        except UserError as error:
            problems.append(str(error))
            if rank_and_size(group)[0] == 0:
                _log.warning("damaged checkpoint %s skipped: %s", path, error)
        else:
            return path
    if problems:
        raise UserError(f"{root}: every checkpoint is damaged: " + "; ".join(problems), everywhere=True)
    return None


def read(path: Path, kind: str | None, verify: bool = True) -> dict[str, Tensor]:
    """Read one kind of every parameter as CPU tensors by name (None: the whole tensors), only in this process.

    Use `verify=False` only for a path that `find` has just returned. Raises UserError if the checkpoint is damaged or
    has nothing of that kind.
    """
    manifest = read_manifest(path)
    if verify:
        check_files(path, manifest)
    names = {key: key if kind is None else key.removeprefix(f"{kind}.") for key in manifest.keys}
    records = {key: record for key, record in manifest.keys.items() if record.kind == kind}
    if not records:
        held = {record.kind for record in manifest.keys.values()} - {None}
        raise UserError(f"{path}: holds nothing of kind '{kind}' (it holds {', '.join(sorted(map(str, held)))})")
    full = {key: torch.empty(record.shape, dtype=getattr(torch, record.dtype)) for key, record in records.items()}
    reader = BoxReader(path, manifest.files)
    reader.read_metadata()
    targets = {key: whole(tensor) for key, tensor in full.items()}
    _run_dcp(path, lambda: dcp_load(targets, storage_reader=reader, planner=BoxLoadPlanner(), no_dist=True))
    return {names[key]: tensor for key, tensor in full.items()}


def remove_leftovers(root: Path) -> None:
    """Remove what a killed save left. Only the process that holds the run's lock may call it, before any rank saves."""
    if root.is_dir():
        for path in root.glob(f"{_LEFTOVER}*"):
            shutil.rmtree(path, ignore_errors=True)
        remove_temporaries(root / LATEST)


# -- saving ---------------------------------------------------------------------------------------


def _prepare(root: Path, final: Path, temporary: Path, state: dict[str, Any]) -> None:
    check_json(state, "state")
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove_leftovers(root)
        if final.exists() and references(final) and _is_sound(final):
            names = ", ".join(references(final))
            raise UserError(f"{final}: cannot be replaced, because {names} refers to it; train in another run_dir")
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"{error.filename or root}: {error.strerror}; checkpoints need a writable directory") from error


def _require_visible(temporary: Path) -> None:
    if not temporary.is_dir():
        raise UserError(f"{temporary}: not visible from every rank; run_dir must be on a file system all nodes share")


def _write(
    folder: Path, fragments: list[Fragment], tensors: dict[str, Tensor], group: Group
) -> tuple[dict[str, FileRecord], dict[str, KeyRecord]]:
    owned = _owned(tensors, group)
    pieces = run_on_all_ranks(group, lambda: leaves(fragments, owned, saving=True))
    writer = BoxWriter(folder)
    no_dist = not dist.is_initialized()
    metadata = _run_dcp(
        folder,
        lambda: dcp_save(pieces, storage_writer=writer, planner=BoxSavePlanner(), process_group=group, no_dist=no_dist),
    )
    run_on_all_ranks(group, lambda: _read_back(folder, writer.written))
    written = gather_if_any(group, writer.written or None)
    files = {name: FileRecord(*record) for records in written.values() for name, record in records.items()}
    whole_names = gather_if_any(group, list(owned) or None)
    return files, _keys(metadata, {name for names in whole_names.values() for name in names})


def _owned(tensors: dict[str, Tensor], group: Group) -> dict[str, Tensor]:
    """Return the whole tensors that this rank writes: those that no lower rank passes."""
    rank, _ = rank_and_size(group)
    lower = {
        name for other, names in gather_if_any(group, list(tensors) or None).items() if other < rank for name in names
    }
    return {name: tensor for name, tensor in tensors.items() if name not in lower}


def _read_back(folder: Path, written: dict[str, tuple[int, str]]) -> None:
    for name, (num_bytes, digest) in written.items():
        path = folder / name
        if path.stat().st_size != num_bytes or sha256_of(path) != digest:
            raise UserError(f"{path}: the content read back differs from the content written; the disk is failing")


def _keys(metadata: Metadata, whole_names: set[str]) -> dict[str, KeyRecord]:
    keys = {}
    for key, entry in sorted(metadata.state_dict_metadata.items()):
        assert isinstance(entry, TensorStorageMetadata)
        kind = None if key in whole_names else key.partition(".")[0]
        keys[key] = KeyRecord(tuple(entry.size), str(entry.properties.dtype).removeprefix("torch."), kind)
    return keys


def _commit(manifest: Manifest, temporary: Path, final: Path) -> None:
    path = temporary
    try:
        manifest.write(temporary)
        path = final
        if final.exists():  # damaged, or of a lineage that was replaced: the run reached this step again
            referring = references(final)
            final.rename(final.with_name(f"{_LEFTOVER}replaced-{final.name}"))
            temporary.rename(final)
            for name in referring:
                protect(final, name)
        else:
            temporary.rename(final)
        sync_directory(final.parent)
        path = final.parent / LATEST
        write_file(path, final.name + "\n")
    except OSError as error:
        raise UserError(f"checkpoint not written: {error.filename or path}: {error.strerror}") from error
    except UserError as error:
        raise UserError(f"checkpoint not written: {error}") from error


def _prune(root: Path, step: int, keep: int) -> None:
    remove_leftovers(root)
    removable = [path for path in list_checkpoints(root) if not references(path)]
    newer = [path for path in removable if (step_of(path) or 0) > step]
    for path in newer:
        _log.warning("%s is newer than the checkpoint just written and not its ancestor: removed", path)
    current = [path for path in list_checkpoints(root) if path not in newer]
    for path in [*newer, *(path for path in current[max(1, keep) :] if path in removable)]:
        # Renamed first: a kill during the removal must not leave a directory that looks like a damaged checkpoint.
        doomed = path.with_name(f"{_LEFTOVER}pruned-{path.name}")
        try:
            path.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            _log.warning("%s could not be pruned: %s", path, error.strerror)


def _is_sound(path: Path) -> bool:
    try:
        check_files(path, read_manifest(path))
    except UserError:
        return False
    return True


# -- loading --------------------------------------------------------------------------------------


def _verified(path: Path, group: Group) -> Manifest:
    manifest = read_manifest(path)
    check_files(path, manifest, *rank_and_size(group))
    return manifest


def _read_into(path: Path, manifest: Manifest, requested: dict[str, GlobalTensor], group: Group) -> None:
    reader = BoxReader(path, manifest.files)
    # Read here first, so that an error is the same UserError on all ranks; DCP would wrap it.
    run_on_all_ranks(group, reader.read_metadata)
    no_dist = not dist.is_initialized()
    _run_dcp(
        path,
        lambda: dcp_load(
            requested,  # type: ignore[arg-type]
            storage_reader=reader,
            planner=BoxLoadPlanner(),
            process_group=group,
            no_dist=no_dist,
        ),
    )


@torch.no_grad()
def _copy_shared_kinds(fragments: list[Fragment], kinds: dict[str, str]) -> None:
    """Copy a loaded kind to the other kinds that map to the same kind in the files (`leaves` loads only the first)."""
    for fragment in fragments:
        source: dict[str, Tensor] = {}
        for kind, view in fragment.tensors.items():
            if kind in kinds:
                loaded = source.setdefault(kinds[kind], view)
                if loaded is not view:
                    view.copy_(loaded)


def _run_dcp(path: Path, function: Callable[[], Any]) -> Any:
    """Call DCP; convert its exception (a BaseException, equal on all ranks) to an ordinary one."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            return function()
    except CheckpointException as failed:
        errors = [error for _, (error, _) in sorted(failed.failures.items())]
        refusals = list(dict.fromkeys(str(error) for error in errors if isinstance(error, UserError | OSError)))
        if refusals:
            raise UserError("; ".join(refusals[:3]), everywhere=True) from errors[0]
        if all(isinstance(error, ValueError) for error in errors):
            raise ValueError(f"{path}: {errors[0]}") from errors[0]
        raise RuntimeError(f"{path}: {failed}") from errors[0]
