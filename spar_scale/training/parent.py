"""The run a phase starts from: which of its checkpoints, held fast by its hash, and its averaged weights.

The first start chooses the parent's newest whole checkpoint and notes it in `parent.json`; every later
start reads that very one, which the parent's pruning leaves alone. A start that left no checkpoint binds no
later one. The averaged weights replace those of the same names; what the parent did not train keeps what the
stage was built with.
"""

from __future__ import annotations

import errno
import json
import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from parallel import checkpoint
from parallel.checkpoint.manifest import list_checkpoints, read_manifest
from parallel.errors import UserError, nearest
from parallel.files import write_file
from parallel.launch.agreement import run_on_first_rank
from spar_scale import stages
from spar_scale.config.recipe import Recipe, behind_link, beside
from spar_scale.models.published import replace_values
from spar_scale.stages import Stage
from spar_scale.training.run_directory import has_trained

RECORD = "parent.json"
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_log = logging.getLogger(__name__)


def choose_parent(recipe: Recipe, group: dist.ProcessGroup | None) -> None:
    """Note the checkpoint that `init_from` stands for; all ranks of `group` call it together.

    Raises UserError as `check_parent` does, and where the files of every checkpoint of the parent are damaged.
    """
    if recipe.init_from is None or run_on_first_rank(group, lambda: check_parent(recipe)):
        return
    found = checkpoint.find(_checkpoints(recipe), group)
    assert found is not None
    run_on_first_rank(group, lambda: _record(recipe, found))


def check_parent(recipe: Recipe) -> bool:
    """Return whether a run has noted its parent for good: it has trained since. Only manifests are read.

    Raises UserError where the run started from another parent, where what it started from is gone, and where
    `init_from` names a run without a checkpoint whose manifest can be read.
    """
    if recipe.init_from is None:
        return False
    record = _recorded(recipe.run_dir) if has_trained(recipe.run_dir) else None  # a start that saved nothing binds none
    if record is not None:
        if record["run"] != recipe.init_from:
            raise UserError(f"init_from: found {recipe.init_from}, but this run started from {record['run']}")
        _recorded_checkpoint(recipe, record)
        return True
    root, problems = _checkpoints(recipe), list[str]()
    for path in list_checkpoints(root):
        try:
            read_manifest(path)
            return False
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(f"init_from: every checkpoint is damaged: {'; '.join(problems)}; train that phase again")
    raise UserError(
        f"init_from: {root} holds no checkpoint; train that phase first (spar-scale train, run_dir={root.parent})"
        f"{behind_link(recipe.run_dir, recipe.init_from)}"
    )


def started_stage(recipe: Recipe, read: bool = True) -> Stage:
    """Build the recipe's stage with the weights it starts from (each process by itself).

    Without `read`, those that no parent has trained stay in the files of their parts.
    """
    stage = stages.build(recipe, read)
    record = _recorded(recipe.run_dir) if recipe.init_from is not None else None
    if record is not None:
        path = _recorded_checkpoint(recipe, record)
        overwrite(stage.model, checkpoint.read(path, "ema"), path)
    return stage


def overwrite(model: nn.Module, weights: dict[str, torch.Tensor], origin: Path) -> None:
    """Copy weights into the parameters of the same names; UserError for a name or shape the model has not."""
    own = dict(model.named_parameters())
    for name, tensor in weights.items():
        if name not in own:
            raise UserError(f"{origin}: holds {name}, which the model of this recipe has not{nearest(name, own)}")
        if own[name].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)} there, {tuple(own[name].shape)} here"
            raise UserError(f"{origin}: {name} has another shape ({shapes}); is model.preset the same?")
        replace_values(own[name], tensor)


def _checkpoints(recipe: Recipe) -> Path:
    """The directory of the parent's checkpoints."""
    assert recipe.init_from is not None
    return beside(recipe.run_dir, recipe.init_from) / "checkpoints"


def _recorded_checkpoint(recipe: Recipe, record: dict[str, Any]) -> Path:
    """The checkpoint that a run has noted. Raises UserError where it is gone or another."""
    path = _checkpoints(recipe) / record["checkpoint"]
    try:
        found = checkpoint.manifest_hash(path)
    except UserError as error:
        raise UserError(f"init_from: {error}; this run started from that checkpoint: restore it") from None
    if found != record["manifest"]:
        raise UserError(f"init_from: {path} is not the checkpoint that this run started from; restore it")
    return path


def _recorded(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(record[key], str) for key in ("run", "checkpoint", "manifest")):
            return record
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(
        f"{path}: is damaged, must be a JSON object with run, checkpoint and manifest; restore it, or start in another "
        "run_dir"
    )


def _record(recipe: Recipe, path: Path) -> None:
    state = read_manifest(path).state
    wanted = state["recipe"]["train"]["steps"]
    if state["step"] < wanted:
        _log.warning("init_from: starts from step %d of %d of %s", state["step"], wanted, recipe.init_from)
    try:
        checkpoint.protect(path, by=str(recipe.run_dir))
    except UserError as error:
        if getattr(error.__cause__, "errno", None) not in READ_ONLY:
            raise
        _log.warning(
            "warning: init_from: this run cannot be noted beside its parent's checkpoint (%s). If the parent trains "
            "further, its pruning may remove it, and this run could not be resumed: keep a copy of %s",
            error, path,
        )  # fmt: skip
    record = {"run": recipe.init_from, "checkpoint": path.name, "manifest": checkpoint.manifest_hash(path)}
    write_file(recipe.run_dir / RECORD, json.dumps(record) + "\n")
