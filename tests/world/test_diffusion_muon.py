"""The engine's Muon learns what a plain one does: the stage-0 diffusion transformer, at equal steps.

The plain one is written out here in fp32 (Newton-Schulz of five steps, Nesterov momentum 0.95) and run
in an ordinary loop on the same batches and schedule; held-out flow-matching losses of the averaged
weights may differ by 5 %. `SPAR_MUON_STEPS=385` makes it as long as it is in practice, with the recipe's
batch and enough scenes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from launching import run_world
from tiny_parts import make_parts
from tiny_runs import metrics, phase_values, train_all

STEPS = int(os.environ.get("SPAR_MUON_STEPS", "24"))
LONG = STEPS > 100
BATCH, SCENES, HELD_OUT = (64, 20000, 500) if LONG else (16, 128, 64)
MUON, ADAM = 0.015, 1.5e-3


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz: the nearest matrix with all singular values about 1."""
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x


def plain_training(values: dict) -> dict[str, torch.Tensor]:
    """An ordinary loop; returns the averaged weights."""
    from parallel.program import Program
    from spar_scale.config.recipe import Recipe
    from spar_scale.config.schedule import learning_rate
    from spar_scale.data.loader import Loader, Source
    from spar_scale.stages import build
    from spar_scale.training.optimizers import parameter_groups

    recipe = Recipe.model_validate_json(json.dumps(values))
    stage = build(recipe)
    program = Program(stage.layers, stage.inputs, list(stage.terms))
    groups = parameter_groups(stage, recipe.optimizer)
    hidden = [p for group in groups if group["use_muon"] for p in group["params"]]
    other = torch.optim.AdamW([p for group in groups if not group["use_muon"] for p in group["params"]], lr=ADAM,
                              betas=recipe.optimizer.betas, weight_decay=0.0)  # fmt: skip
    momentum = [torch.zeros_like(p) for p in hidden]
    named = {name: p for name, p in stage.model.named_parameters() if p.requires_grad}
    average = {name: p.detach().clone() for name, p in named.items()}
    sources = [Source(source.name, source.shards, source.weight) for source in recipe.data.sources]
    loader = Loader(sources, stage.sample, recipe.seed, BATCH, BATCH, BATCH, 0, 1, 0, 0, STEPS)
    for step, batch in enumerate(loader, start=1):
        program(batch).sum().div(BATCH).backward()
        lr = learning_rate(recipe.optimizer, step, STEPS)
        with torch.no_grad():
            for p, m in zip(hidden, momentum, strict=True):
                m.lerp_(p.grad, 0.05)
                update = p.grad.lerp(m, 0.95).flatten(1)
                scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                p -= lr * (MUON / ADAM) * scale * orthogonal(update).view_as(p)
                p.grad = None
            other.param_groups[0]["lr"] = lr
            other.step()
            other.zero_grad()
            for name, p in named.items():
                average[name].lerp_(p, 1 - recipe.optimizer.ema_decay)
    return average


def compare(rank: int, world: int, folder: str, values: dict) -> tuple[float, float]:
    """Held-out losses: the engine's run, the plain loop."""
    from spar_scale.config.recipe import Recipe
    from spar_scale.evaluation.held_out import held_out_terms, stage_terms
    from spar_scale.stages import build
    from spar_scale.training.parent import overwrite

    shards = {"images": f"{folder}/data/heldout-*.tar"}
    train_all(rank, world, [values])
    engine = held_out_terms(Path(values["run_dir"]), shards, HELD_OUT)["flow_matching"]
    stage = build(Recipe.model_validate_json(json.dumps(values)))
    overwrite(stage.model, plain_training(values), Path("plain"))
    return float(engine.mean()), float(stage_terms(stage, shards, HELD_OUT)["flow_matching"].mean())


@pytest.mark.timeout(3600)
def test_the_engines_muon_reaches_the_loss_of_a_plain_one(tmp_path: Path) -> None:
    from spar_scale.data.shapes_world import World
    from spar_scale.data.shards import make_world

    make_world(World(seed=5, scenes=SCENES, heldout=HELD_OUT, edits=0, per_shard=2000), tmp_path / "data")
    values = phase_values(
        tmp_path / "engine", "bootstrap/diffusion", tmp_path / "data", make_parts(tmp_path / "parts"), "tiny",
        train={"steps": STEPS, "log_every": STEPS}, checkpoint={"every": STEPS}, global_batch=BATCH,
        optimizer={"name": "muon", "muon_lr": MUON, "lr": ADAM, "warmup_steps": min(40, STEPS // 4), "clip": 0,
                   "ema_decay": 0.99 if LONG else 0.9},
        data__task_block=BATCH, parallel={"zero": 1, "micro_batch": BATCH},
    )  # fmt: skip
    engine, plain = run_world(1, compare, str(tmp_path), values, initialise=False, timeout_s=3600 if LONG else 300)[0]
    first = metrics(tmp_path / "engine")[0]["loss"]
    print(f"held-out flow matching after {STEPS} steps: engine {engine:.4f}, plain {plain:.4f}; at first {first:.4f}")
    assert engine < 0.9 * first
    assert abs(engine - plain) <= 0.05 * plain
