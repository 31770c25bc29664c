"""Load the EMA weights of a run as a model, or write them in the published layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from parallel import checkpoint
from parallel.errors import UserError
from spar_scale.config.recipe import Recipe, load_recipe
from spar_scale.data.loader import Loader
from spar_scale.data.spec import SampleSpec, sources_of
from spar_scale.stages import Stage
from spar_scale.stages.forward import Forward
from spar_scale.stages.parts import preset_of
from spar_scale.training.parent import overwrite, started_stage

CALIBRATION = 256
"""Number of images on which the scale of a tokenizer's latents is measured."""


def recipe_of(run_dir: Path) -> Recipe:
    """Return the recipe of a run, with its current `run_dir`. Raises UserError if there is none."""
    if not (run_dir / "recipe.yaml").is_file():
        raise UserError(f"{run_dir}: holds no recipe.yaml; expected a directory that `spar-scale train` wrote")
    return load_recipe(run_dir / "recipe.yaml").model_copy(update={"run_dir": run_dir})


def trained_forward(run_dir: Path) -> tuple[Forward, Path]:
    """Return a run's forward with the EMA of its newest intact checkpoint (eval mode, CPU), and that checkpoint."""
    recipe = recipe_of(run_dir)
    latest = checkpoint.find(run_dir / "checkpoints")
    if latest is None:
        raise UserError(f"{run_dir}: holds no checkpoint yet; train it further")
    return Forward(ema_stage(recipe, latest), preset_of(recipe)), latest


def ema_stage(recipe: Recipe, path: Path) -> Stage:
    """Return the recipe's stage with the EMA of the checkpoint at `path` (eval mode, CPU, only this process)."""
    stage = started_stage(recipe)
    overwrite(stage.model, checkpoint.read(path, "ema"), path)
    stage.model.eval()
    return stage


def export(recipe: Recipe, path: Path, run_dir: Path) -> None:
    """Write the checkpoint's EMA in the published layout as `run_dir/pretrained`, replacing an older one as a whole."""
    stage = ema_stage(recipe, path)
    assert stage.export is not None
    target, temporary = run_dir / "pretrained", run_dir / ".pretrained.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    images = calibration_images(recipe, stage.sample) if stage.export.calibrated else None
    stage.export.write(stage, temporary, images)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def calibration_images(recipe: Recipe, sample: SampleSpec) -> torch.Tensor:
    """Return the good ones of the first CALIBRATION images (n, 3, S, S) in the run's sample order.

    The order does not depend on the layout, so neither does the measured scale. Raises UserError if all are bad.
    """
    loader = Loader(
        sources_of(recipe),
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
            f"export: none of the first {CALIBRATION} images of data.sources could be used "
            f"({error['shard']}: {error['key']}: {error['reason']}), but the scale of the latents is measured on them. "
            "Restore the shards that the run was trained on, and run the same command again"
        )
    return batch["images"][batch["weight"] > 0]
