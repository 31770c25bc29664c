"""Ablations: what each switch of SPAR changes, over seeds, on held-out data.

A row turns switches; the phases that read them are trained again from what the others share (`chain.py`),
with the steps and the data of the full system. Each row's metrics are named here, before it runs:

    psnr          dB, held-out reconstructions                  drift   MSE of f_v against the untrained encoder's
    vqa           questions answered right from the tokenizer's features
    teacher       L_p: MSE of z_p against the pixel encoder (where there is a pixel stream)
    sharpness     gradient energy of reconstructions over that of the pictures; 1 is right
    flow          held-out flow-matching loss     gap    the same with prompts shuffled, minus it

A difference counts where it has one sign over all seeds and is larger than the spread of the full system
over the seeds; else the table says "no effect". The seeds share stage 0.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.errors import UserError, nearest
from spar_scale.chain import TEACHER, Chain
from spar_scale.data.commands import make
from spar_scale.data.shapes_world import World
from spar_scale.evaluation.held_out import held_out_terms
from spar_scale.evaluation.reconstruction import psnr
from spar_scale.evaluation.scenes import scenes_of
from spar_scale.evaluation.understanding import answers_right, held_out_questions
from spar_scale.models.autoencoder import encode_images
from spar_scale.models.mllm import own_features
from spar_scale.models.tokenizer import UnifiedTokenizer, to_grid
from spar_scale.settings import load
from spar_scale.stages.parts import load_autoencoder, load_mllm, preset_of
from spar_scale.training.export import recipe_of, trained_model

SAMPLES = {"demo": 500, "smoke": 40}
RESULT = "ablation.json"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """A variant: its switches, the phase whose run is measured, and which metrics tell whether it acts."""

    phase: str
    switches: Mapping[str, object] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()


ROWS = {
    "tokenizer": Row("tokenizer_encoder"),
    "without pixel stream": Row("tokenizer_encoder", {"model.streams": "semantic"}, ("psnr",)),
    "without semantic stream": Row("tokenizer_encoder", {"model.streams": "pixel"}, ("psnr", "vqa")),
    "without semantic stream and L_s": Row(
        "tokenizer_encoder", {"model.streams": "pixel", "model.semantic_distillation": False}, ("psnr", "vqa")
    ),
    "frozen encoder": Row("tokenizer_encoder", {"model.encoder": "frozen"}, ("psnr",)),
    "without L_s": Row("tokenizer_encoder", {"model.semantic_distillation": False}, ("drift", "vqa", "psnr")),
    "without L_p": Row("tokenizer_encoder", {"model.pixel_alignment": False}, ("teacher", "psnr")),
    "without gradient difference": Row("tokenizer_encoder", {"objective.perceptual_weight": 0.0}, ("sharpness",)),
    "with L_GAN": Row("tokenizer_encoder", {"objective.adversarial_weight": 0.1}, ("sharpness", "psnr")),
    "unified": Row("align_joint"),
    "routing: last layer": Row("align_joint", {"model.routing": "last_layer"}, ("flow", "gap")),
    "routing: uniform": Row("align_joint", {"model.routing": "uniform"}, ("flow", "gap")),
    "L_align to an external teacher": Row(
        "align_joint",
        {"model.alignment": "external", TEACHER: "../bootstrap_mllm/pretrained"},
        ("flow", "gap"),
    ),
    "without L_align": Row("align_joint", {"model.alignment": "none"}, ("flow", "gap")),
}
"""The full system of each phase comes before its variants and has no switches."""


def ablate(
    out: Path, size: str, seeds: Sequence[int], names: Sequence[str] | None = None, overrides: Sequence[str] = ()
) -> str:
    """Train and measure the rows under `out` (all, or those named and the full systems); return the table.

    `overrides` are laid over every recipe after stage 0, so a study can be made shorter. Every value is
    kept in `out/ablation.json`. Raises UserError for a row that does not exist.
    """
    chosen = _chosen(names)
    make(load(Chain(out, size, 0).folder / "world.yaml", World), out / "data")
    values: dict[str, dict[str, list[float]]] = {name: {} for name in chosen}
    for seed in seeds:
        chain = Chain(out / f"seed-{seed}", size, seed, shared=out, overrides=overrides)
        for name in chosen:
            row = ROWS[name]
            run_dir = chain.train(row.phase, row.switches)
            for metric, value in measure(run_dir, out, SAMPLES[size]).items():
                values[name].setdefault(metric, []).append(value)
            log.info("seed %d, %s: %s", seed, name, {metric: round(v[-1], 4) for metric, v in values[name].items()})
    (out / RESULT).write_text(
        json.dumps({"size": size, "overrides": list(overrides), "seeds": list(seeds), "rows": values}, indent=1) + "\n"
    )
    return table(values)


def measure(run_dir: Path, out: Path, samples: int) -> dict[str, float]:
    """All metrics of a run that apply to its phase, on held-out scenes."""
    recipe = recipe_of(run_dir)
    if recipe.stage == "tokenizer":
        return _measure_tokenizer(recipe, run_dir, out, samples)
    shards = {"generation": str(out / "data" / "heldout-*.tar")}
    right = held_out_terms(run_dir, shards, samples)["flow_matching"]
    shuffled = held_out_terms(run_dir, shards, samples, shuffled=True)["flow_matching"]
    return {"flow": float(right.mean()), "gap": float((shuffled - right).mean())}


def table(values: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Each row's metrics against the full system's: mean, difference, spread of the full system, verdict."""
    lines = ["| row | metric | full | row | difference | spread | |", "|---|---|---|---|---|---|---|"]
    full: Mapping[str, Sequence[float]] = {}
    for name, measured in values.items():
        row = ROWS[name]
        if not row.switches:
            full = measured
        for metric in row.metrics:
            if metric in measured and metric in full:
                lines.append(_line(name, metric, full[metric], measured[metric]))
    return "\n".join(lines)


def acts(full: Sequence[float], other: Sequence[float]) -> bool:
    """Whether a row differs: one sign over all seeds, and on average by more than the full system's spread."""
    differences = [b - a for a, b in zip(full, other, strict=True)]
    one_sign = all(d > 0 for d in differences) or all(d < 0 for d in differences)
    return len(full) > 1 and one_sign and abs(sum(differences) / len(differences)) > max(full) - min(full)


def _line(name: str, metric: str, full: Sequence[float], other: Sequence[float]) -> str:
    mean, row = sum(full) / len(full), sum(other) / len(other)
    verdict = ("acts" if acts(full, other) else "no effect") if len(full) > 1 else "one seed"
    spread = max(full) - min(full)
    return f"| {name} | {metric} | {mean:.4f} | {row:.4f} | {row - mean:+.4f} | {spread:.4f} | {verdict} |"


def _chosen(names: Sequence[str] | None) -> list[str]:
    if names is None:
        return list(ROWS)
    if unknown := [name for name in names if name not in ROWS]:
        raise UserError(f"--row: '{unknown[0]}' is no row{nearest(unknown[0], ROWS)}; there are {', '.join(ROWS)}")
    phases = {ROWS[name].phase for name in names}
    return [name for name, row in ROWS.items() if name in names or (not row.switches and row.phase in phases)]


@torch.no_grad()
def _measure_tokenizer(recipe: Any, run_dir: Path, out: Path, samples: int) -> dict[str, float]:
    model, preset = trained_model(run_dir)[0], preset_of(recipe)
    assert isinstance(model, UnifiedTokenizer)
    pretrained = {part: (run_dir / where).resolve() for part, where in recipe.model.pretrained.items()}
    scenes = torch.stack([scene.image for scene in scenes_of(out / "data", samples)])
    made = torch.cat([model.reconstruct(part) for part in scenes.split(64)])
    mllm = load_mllm(pretrained["mllm"], preset)
    features, untrained = (
        torch.cat([encode(part) for part in scenes.split(64)]) for encode in (model.features, own_features(mllm))
    )
    questions = held_out_questions(str(out / "data" / "heldout-*.tar"), samples, preset.image_size)
    right = answers_right(mllm.model.language_model, mllm.lm_head, model.features, questions)
    measured = {
        "psnr": float(psnr(made, scenes).mean()),
        "drift": float((features - untrained).square().mean()),
        "vqa": float(right.mean()),
        "sharpness": float(_gradient_energy(made) / _gradient_energy(scenes)),
    }
    if model.streams != "semantic":
        teacher, _ = load_autoencoder(pretrained["pixel_autoencoder"], preset)
        latents = torch.cat([to_grid(model.pixel_stream(part)) for part in features.split(64)])
        wanted = torch.cat([encode_images(teacher.encoder, part) for part in scenes.split(64)])
        measured["teacher"] = float((latents - wanted).square().mean())
    return measured


def _gradient_energy(images: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels of images (n, 3, S, S)."""
    return images.diff(dim=-1).square().mean() + images.diff(dim=-2).square().mean()
