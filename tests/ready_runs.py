"""Run directories as training leaves them, made without training: the averages are the weights of the seed."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_parts import parts_of

from parallel import checkpoint
from parallel.checkpoint.boxes import Fragment
from spar_scale.config.recipe import load_recipe
from spar_scale.stages import build


def make_run(folder: Path, stage: str, phase: str, parts: dict[str, str], moved: float = 0.0, **keys: str) -> Path:
    """Write a run of the tiny preset under `folder`, with the parts it starts from, and one checkpoint.

    Its averages are the weights of the seed with noise of deviation `moved`; `keys` are further ones of its recipe.
    """
    run_dir, source = folder / f"{stage}_{phase}", "captions" if phase == "mllm" else "generation"
    run_dir.mkdir(parents=True)
    pretrained = ", ".join(f'{name}: "{path}"' for name, path in parts_of(stage, phase, parts).items())
    (run_dir / "recipe.yaml").write_text(
        f"stage: {stage}\nphase: {phase}\nmodel: {{preset: tiny, pretrained: {{{pretrained}}}}}\n"
        f"run_dir: {run_dir}\nglobal_batch: 4\ntrain: {{steps: 1}}\noptimizer: {{lr: 1.0e-3}}\n"
        f"data: {{task_block: 4, sources: [{{name: {source}, shards: none}}]}}\ncheckpoint: {{every: 1}}\n"
        + "".join(f"{key}: {value}\n" for key, value in keys.items())
    )
    built = build(load_recipe(run_dir / "recipe.yaml"))
    noise = torch.Generator().manual_seed(6)
    averages = [
        Fragment(name, tuple(parameter.shape), 0, {"ema": _moved(parameter, moved, noise)}, None, writes=True)
        for name, parameter in built.model.named_parameters()
        if parameter.requires_grad
    ]
    checkpoint.save(run_dir / "checkpoints", 1, averages, {"step": 1}, {}, None, keep=1)
    return run_dir


def _moved(parameter: torch.Tensor, deviation: float, noise: torch.Generator) -> torch.Tensor:
    flat = parameter.detach().flatten()
    return flat + deviation * torch.randn(flat.shape, generator=noise) if deviation else flat
