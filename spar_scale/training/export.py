"""From a run to a model: its averaged weights, in memory or in the published layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from parallel import checkpoint
from parallel.errors import UserError
from spar_scale import stages
from spar_scale.config.recipe import Recipe, load_recipe
from spar_scale.data.loader import Loader, Source
from spar_scale.data.spec import SampleSpec
from spar_scale.stages import Stage
from spar_scale.stages.forward import Forward
from spar_scale.stages.parts import preset_of
from spar_scale.training.parent import overwrite, started_stage

CALIBRATION = 256
"""Images on which the scale of a tokenizer's latents is measured."""


def recipe_of(run_dir: Path) -> Recipe:
    """The recipe a run was trained with, with `run_dir` as it is found now. Raises UserError where there is none."""
    if not (run_dir / "recipe.yaml").is_file():
        raise UserError(f"{run_dir}: no recipe.yaml in it; a directory that `spar-scale train` wrote is needed")
    return load_recipe(run_dir / "recipe.yaml").model_copy(update={"run_dir": run_dir})


def trained_forward(run_dir: Path) -> tuple[Forward, Path]:
    """Return a run's forward, in eval mode on the CPU, with the EMA of its newest whole checkpoint, and its path."""
    recipe = recipe_of(run_dir)
    found = checkpoint.find(run_dir / "checkpoints")
    if found is None:
        raise UserError(f"{run_dir}: holds no checkpoint yet; train it further")
    return Forward(averaged_stage(recipe, found), preset_of(recipe)), found


def averaged_stage(recipe: Recipe, path: Path) -> Stage:
    """Return the recipe's stage in eval mode with the EMA of the checkpoint at `path` (this process alone, CPU)."""
    stage = started_stage(recipe)
    overwrite(stage.model, checkpoint.read(path, "ema"), path)
    stage.model.eval()
    return stage


def export(recipe: Recipe, path: Path, run_dir: Path) -> None:
    """Write the checkpoint's EMA as `run_dir/pretrained`: temporary name first, replaced as a whole."""
    stage = stages.build(recipe)
    assert stage.export is not None
    target, temporary = run_dir / "pretrained", run_dir / ".pretrained.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    images = calibration_images(recipe, stage.sample) if stage.export.calibrated else None
    stage.export.write(averaged_stage(recipe, path), temporary, images)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def calibration_images(recipe: Recipe, sample: SampleSpec) -> torch.Tensor:
    """The usable ones of the first CALIBRATION images (n, 3, S, S) of the run's own order, under any layout.

    Raises UserError where none is usable.
    """
    loader = Loader(
        [Source(source.name, source.shards, source.weight) for source in recipe.data.sources],
        sample,
        seed=recipe.seed,
        global_batch=CALIBRATION,
        task_block=CALIBRATION,
        micro_batch=CALIBRATION,
        dp_rank=0,
        dp_size=1,
        workers=0,
        first_step=0,
        steps=1,
    )
    (batch,) = loader
    if not batch["weight"].any():
        error = batch["errors"][0]
        raise UserError(
            f"export: found none of the first {CALIBRATION} images of data.sources usable; the scale of the latents is "
            f"measured on them ({error['shard']}: {error['key']}: {error['reason']}). Restore the shards that the run "
            "was trained on, and give the same command again"
        )
    return batch["images"][batch["weight"] > 0]
