"""Load the EMA weights of a run as a model, or write them in the published layout."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from parallel import checkpoint
from parallel.errors import UserError
from parallel.launch.agreement import run_long_on_first_rank, run_on_all_ranks
from parallel.topology import Topology
from spar_scale.config.recipe import Recipe, load_recipe
from spar_scale.stages import LatentScale, Stage
from spar_scale.stages.forward import Forward
from spar_scale.stages.parts import preset_of
from spar_scale.training.calibration import measured_scale
from spar_scale.training.parent import overwrite, started_stage


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
    """Return the recipe's stage with the EMA of a checkpoint (fp32, eval mode, CPU, only this process).

    `path` is one that `checkpoint.find` has just returned: its files are not verified again.
    """
    stage = started_stage(recipe.model_copy(update={"precision": "fp32"}))  # that of the EMA
    overwrite(stage.model, checkpoint.read(path, "ema", verify=False), path)
    stage.model.eval()
    return stage


def export(
    recipe: Recipe,
    path: Path,
    calibrated: bool,
    topology: Topology,
    device: torch.device,
    report: Callable[[str], None],
) -> None:
    """Write the checkpoint's EMA in the published layout as `run_dir/pretrained`, replacing an older one as a whole.

    All ranks call it together. The first one writes; with `calibrated`, all measure the scale of the latents, each with
    the whole model, under any layout. `report` gets the progress.
    """
    group = topology.agreement_group
    report("loading the EMA")
    loads = calibrated or topology.rank == 0
    stage = run_on_all_ranks(group, lambda: ema_stage(recipe, path) if loads else None)
    scale = None
    if calibrated:
        assert stage is not None
        scale = measured_scale(recipe, Forward(stage, preset_of(recipe)), topology, device, report)
    run_long_on_first_rank(group, lambda: _write(stage, recipe.run_dir, scale), lambda text: report(f"writing {text}"))


def _write(stage: Stage | None, run_dir: Path, scale: LatentScale | None) -> None:
    assert stage is not None and stage.export is not None
    target, temporary = run_dir / "pretrained", run_dir / ".pretrained.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    stage.export.write(stage, temporary, scale)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
