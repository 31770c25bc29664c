"""From a run to a model: its averaged weights, in memory or in the published layout."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import nn

from parallel import checkpoint
from parallel.errors import UserError
from spar_scale import stages
from spar_scale.recipe import Recipe, load_recipe
from spar_scale.training.parent import overwrite, started_stage


def recipe_of(run_dir: Path) -> Recipe:
    """The recipe a run was trained with, with `run_dir` as it is found now. Raises UserError where there is none."""
    if not (run_dir / "recipe.yaml").is_file():
        raise UserError(f"{run_dir}: no recipe.yaml in it; a directory that `spar-scale train` wrote is needed")
    return load_recipe(run_dir / "recipe.yaml").model_copy(update={"run_dir": run_dir})


def trained_model(run_dir: Path) -> tuple[nn.Module, Path]:
    """The run's model with the EMA of its newest whole checkpoint, in eval mode on the CPU, and that checkpoint."""
    recipe = recipe_of(run_dir)
    found = checkpoint.find(run_dir / "checkpoints")
    if found is None:
        raise UserError(f"{run_dir}: holds no checkpoint yet; train it further")
    return averaged_model(recipe, found), found


def averaged_model(recipe: Recipe, path: Path) -> nn.Module:
    """The recipe's model in eval mode with the EMA of the checkpoint at `path` (this process alone, CPU)."""
    model = started_stage(recipe).model
    overwrite(model, checkpoint.read(path, "ema"), path)
    return model.eval()


def export(recipe: Recipe, path: Path, run_dir: Path) -> None:
    """Write the checkpoint's EMA as `run_dir/pretrained`: temporary name first, replaced as a whole."""
    write = stages.build(recipe).export
    assert write is not None
    target, temporary = run_dir / "pretrained", run_dir / ".pretrained.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    write(averaged_model(recipe, path), temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
