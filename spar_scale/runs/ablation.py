"""Ablations: the effect of each switch of SPAR, over several seeds, on held-out data.

A row sets switches. The phases that read them are trained again with the steps and data of the full system; all other
phases are shared (`chain.py`). `jobs` runs are trained at the same time. The table below declares each row's metrics
and, if the paper has such a row, the direction that the paper reports, before the row runs:

    psnr          dB, held-out reconstructions                  drift   MSE of f_v from the untrained encoder's
    vqa           share of questions answered right from the tokenizer's features
    teacher       L_p: MSE of z_p from the pixel encoder (if there is a pixel stream)
    sharpness     gradient energy of reconstructions divided by that of the pictures; 1 is ideal
    flow          held-out flow-matching loss     gap    the loss with shuffled prompts minus `flow`

A difference is significant if it has the same sign for all seeds and exceeds the spread of the full system over the
seeds; otherwise the table says "no effect". The seeds share training stage 0. The world has a textured background: on a
plain one the encoder has so little to learn that training it makes no measurable difference.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import Tensor

from parallel.errors import UserError, nearest
from parallel.files import write_file
from spar_scale.config.recipe import Recipe
from spar_scale.config.settings import load
from spar_scale.data.shapes_world import World
from spar_scale.evaluation.held_out import held_out_terms
from spar_scale.evaluation.scenes import scenes_of
from spar_scale.evaluation.understanding import answers_right, held_out_questions
from spar_scale.files.json_files import read_json
from spar_scale.files.outputs import check_files, make_directory
from spar_scale.models.dual_stream import to_grid
from spar_scale.objectives.quality import psnr
from spar_scale.runs.chain import ENCODER_RATE, Chain, data_step
from spar_scale.runs.processes import Step, available_cores, import_before_forks, run_steps
from spar_scale.stages.bootstrap_mllm import published_forward
from spar_scale.stages.parts import preset_of, pretrained_part
from spar_scale.training.export import recipe_of, trained_forward

SAMPLES = {"demo": 500, "smoke": 40}
RESULT = "ablation.json"
VALUES, MEASURING_S = "values.json", 30.0  # estimated duration
_METRICS = TypeAdapter(dict[str, float])
LOWER, HIGHER, SILENT = -1, 1, 0  # direction of a metric in the paper; SILENT: the paper does not report it


@dataclass(frozen=True)
class Row:
    """A variant: its switches, the phase whose run is measured, and the metrics that can show an effect.

    `metrics` maps each metric to its direction in the paper: LOWER, HIGHER, or SILENT if the paper has no such row.
    """

    phase: str
    switches: Mapping[str, object] = field(default_factory=dict)
    metrics: Mapping[str, int] = field(default_factory=dict)


def _tokenizer_with(weight: float, rate: float) -> Row:
    """Return the row with another weight of L_s and another learning-rate multiplier of the encoder."""
    distillation = {"objective.semantic_distillation_weight": weight} if weight else NO_DISTILLATION
    return Row("tokenizer_encoder", {**distillation, ENCODER_RATE: rate}, {"psnr": SILENT, "vqa": SILENT})


NO_DISTILLATION: Mapping[str, object] = {"model.semantic_distillation": False}
ROWS = {
    "tokenizer": Row("tokenizer_encoder"),
    "without pixel stream": Row("tokenizer_encoder", {"model.streams": "semantic"}, {"psnr": LOWER}),
    "without semantic stream": Row("tokenizer_encoder", {"model.streams": "pixel"}, {"psnr": LOWER, "vqa": LOWER}),
    "without semantic stream and L_s": Row(
        "tokenizer_encoder", {"model.streams": "pixel", **NO_DISTILLATION}, {"psnr": LOWER, "vqa": LOWER}
    ),
    "frozen encoder": Row("tokenizer_encoder", {"model.encoder": "frozen"}, {"psnr": LOWER}),
    "without L_s": Row("tokenizer_encoder", NO_DISTILLATION, {"drift": SILENT, "vqa": SILENT, "psnr": SILENT}),
    "without L_p": Row("tokenizer_encoder", {"model.pixel_alignment": False}, {"teacher": SILENT, "psnr": SILENT}),
    "without gradient difference": Row(
        "tokenizer_encoder", {"objective.perceptual_weight": 0.0}, {"sharpness": SILENT}
    ),
    "with L_GAN": Row(
        "tokenizer_encoder", {"objective.adversarial_weight": 0.1}, {"sharpness": SILENT, "psnr": SILENT}
    ),
    "L_s 1, encoder rate 1": _tokenizer_with(1.0, 1.0),
    "L_s 0.1, encoder rate 0.1": _tokenizer_with(0.1, 0.1),
    "L_s 0.1, encoder rate 1": _tokenizer_with(0.1, 1.0),
    "L_s 0, encoder rate 1": _tokenizer_with(0.0, 1.0),
    "unified": Row("align_joint"),
    "routing: last layer": Row("align_joint", {"model.routing": "last_layer"}, {"flow": HIGHER, "gap": LOWER}),
    "routing: uniform": Row("align_joint", {"model.routing": "uniform"}, {"flow": SILENT, "gap": SILENT}),
    "L_align to an external teacher": Row(
        "align_joint",
        {"model.alignment": "external", "model.pretrained.teacher": "../bootstrap_mllm/pretrained"},
        {"flow": SILENT, "gap": SILENT},
    ),
    "without L_align": Row("align_joint", {"model.alignment": "none"}, {"flow": HIGHER, "gap": LOWER}),
}
"""The full system of each phase comes before its variants and has no switches."""

CURVE = {
    (1.0, 0.1): "tokenizer",
    (1.0, 1.0): "L_s 1, encoder rate 1",
    (0.1, 0.1): "L_s 0.1, encoder rate 0.1",
    (0.1, 1.0): "L_s 0.1, encoder rate 1",
    (0.0, 0.1): "without L_s",
    (0.0, 1.0): "L_s 0, encoder rate 1",
}
"""(Weight of L_s, learning-rate multiplier of the encoder) -> row: reconstruction versus understanding."""


def ablate(
    out: Path,
    size: str,
    seeds: Sequence[int],
    names: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
    jobs: int | None = None,
) -> str:
    """Train and measure the rows under `out` (all, or `names` and their full systems); return the tables.

    `overrides` are applied to every recipe after training stage 0, for example to shorten the study. `jobs` runs are
    trained at the same time (default: two, or one on a single core). Finished runs and measurements are not repeated.
    All values are written to `out/ablation.json`. Raises UserError for an unknown row, an `out` that cannot be written,
    and a recipe that training refuses.
    """
    chosen, jobs = _chosen(names), jobs or min(2, available_cores())
    make_directory(out, "--out")
    check_files(out / RESULT)
    chains = [Chain(out / f"seed-{seed}", size, seed, shared=out, overrides=overrides) for seed in seeds]
    world = load(chains[0].folder / "world.yaml", World).model_copy(update={"texture": True})
    steps, files = {"data": data_step(world, out)}, dict[str, list[Path]]()
    for chain in chains:
        for name in chosen:
            trained = chain.needed(ROWS[name].phase, ROWS[name].switches)
            measured = _measured(trained[-1], out, SAMPLES[size])
            files.setdefault(name, []).append(measured.folder / VALUES)
            steps.update({step.name: step for step in [*trained, measured] if step.name not in steps})
    import_before_forks(mlflow=any(chains[0].recipe(row.phase).tracking.mirror for row in ROWS.values()))
    run_steps(list(steps.values()), jobs)
    values = {name: _over_seeds([_read_values(file) for file in of_row]) for name, of_row in files.items()}
    content = {"size": size, "overrides": list(overrides), "seeds": list(seeds), "rows": values}
    write_file(out / RESULT, json.dumps(content, indent=1) + "\n")
    return "\n\n".join(part for part in (table(values), curve(values)) if part)


def _measured(trained: Step, out: Path, samples: int) -> Step:
    """Return the step that measures the run of another step."""
    folder = trained.folder.parent / "measured" / trained.folder.name
    work = functools.partial(_write_values, trained.folder, out, samples, folder / VALUES)
    return Step(f"{trained.name}, measured", folder, work, (trained.name,), MEASURING_S)


def _write_values(run_dir: Path, out: Path, samples: int, file: Path) -> None:
    values = measure(run_dir, out, samples)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, (json.dumps(values) + "\n"))
    print("  ".join(f"{metric} {value:.4f}" for metric, value in values.items()))


def _read_values(file: Path) -> dict[str, float]:
    return read_json(file, _METRICS, f"remove {file.parent} and run the same command again")


def _over_seeds(measured: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    return {metric: [values[metric] for values in measured] for metric in measured[0]}


def measure(run_dir: Path, out: Path, samples: int) -> dict[str, float]:
    """Return all metrics of a run that apply to its phase, on held-out scenes."""
    recipe = recipe_of(run_dir)
    if recipe.stage == "tokenizer":
        return _measure_tokenizer(recipe, run_dir, out, samples)
    shards = {"generation": str(out / "data" / "heldout-*.tar")}
    right = held_out_terms(run_dir, shards, samples)["flow_matching"]
    shuffled = held_out_terms(run_dir, shards, samples, shuffled=True)["flow_matching"]
    return {"flow": float(right.mean()), "gap": float((shuffled - right).mean())}


def table(values: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Return the table of each row's metrics compared with the full system: means, difference, spread, verdict."""
    lines = ["| row | metric | full | row | difference | spread | paper | verdict |", "|---" * 8 + "|"]
    full: Mapping[str, Sequence[float]] = {}
    for name, measured in values.items():
        row = ROWS[name]
        if not row.switches:
            full = measured
        for metric in row.metrics:
            if metric in measured and metric in full:
                lines.append(_line(name, metric, full[metric], measured[metric]))
    return "\n".join(lines)


def curve(values: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Return the table of reconstruction and understanding over weights of L_s and rates; "" if a row is missing."""
    if not set(CURVE.values()) <= set(values):
        return ""
    lines = ["| weight of L_s | encoder's rate | psnr | spread | vqa | spread |", "|---" * 6 + "|"]
    for (weight, rate), name in CURVE.items():
        psnrs, right = values[name]["psnr"], values[name]["vqa"]
        lines.append(
            f"| {weight:g} | {rate:g} | {_mean(psnrs):.2f} | {_spread(psnrs):.2f} | {_mean(right):.3f} |"
            f" {_spread(right):.3f} |"
        )
    return "\n".join(lines)


def is_significant(full: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether a row differs with the same sign for all seeds, and on average by more than the spread."""
    differences = [b - a for a, b in zip(full, other, strict=True)]
    one_sign = all(d > 0 for d in differences) or all(d < 0 for d in differences)
    return len(full) > 1 and one_sign and abs(_mean(differences)) > _spread(full)


def verdict(full: Sequence[float], other: Sequence[float], paper: int) -> str:
    """Return "reproduced" or "opposite" if the paper reports a direction, else "effect"; or "no effect"."""
    if len(full) < 2:
        return "one seed"
    if not is_significant(full, other):
        return "no effect"
    if paper == SILENT:
        return "effect"
    return "reproduced" if (_mean(other) - _mean(full)) * paper > 0 else "opposite"


def _line(name: str, metric: str, full: Sequence[float], other: Sequence[float]) -> str:
    mean, row, paper = _mean(full), _mean(other), ROWS[name].metrics[metric]
    direction = {LOWER: "lower", HIGHER: "higher", SILENT: ""}[paper]
    return (
        f"| {name} | {metric} | {mean:.4f} | {row:.4f} | {row - mean:+.4f} | {_spread(full):.4f} | {direction} |"
        f" {verdict(full, other, paper)} |"
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _spread(values: Sequence[float]) -> float:
    return max(values) - min(values)


def _chosen(names: Sequence[str] | None) -> list[str]:
    if names is None:
        return list(ROWS)
    if unknown := [name for name in names if name not in ROWS]:
        raise UserError(f"--row: '{unknown[0]}' is not a row{nearest(unknown[0], ROWS)}; there are {', '.join(ROWS)}")
    phases = {ROWS[name].phase for name in names}
    return [name for name, row in ROWS.items() if name in names or (not row.switches and row.phase in phases)]


@torch.no_grad()
def _measure_tokenizer(recipe: Recipe, run_dir: Path, out: Path, samples: int) -> dict[str, float]:
    model, preset = trained_forward(run_dir)[0], preset_of(recipe)
    recipe = recipe.model_copy(update={"precision": "fp32"})  # that of the EMA
    parts = {part: pretrained_part(recipe, part) for part in recipe.model.pretrained}
    scenes = torch.stack([scene.image for scene in scenes_of(out / "data", samples)])
    reconstructions = torch.cat([model.reconstruct(part) for part in scenes.split(64)])
    mllm = published_forward(parts["mllm"], preset)
    features, untrained = (
        torch.cat([forward.features(part) for part in scenes.split(64)]) for forward in (model, mllm)
    )
    questions = held_out_questions(str(out / "data" / "heldout-*.tar"), samples, preset.image_size)
    right = answers_right(mllm, model.features, questions)
    measured = {
        "psnr": float(psnr(reconstructions, scenes).mean()),
        "drift": float((features - untrained).square().mean()),
        "vqa": float(right.mean()),
        "sharpness": float(_gradient_energy(reconstructions) / _gradient_energy(scenes)),
    }
    if recipe.model.streams != "semantic":
        teacher, _ = preset.autoencoder.load(parts["pixel_autoencoder"])
        encode = preset.autoencoder.encoding_layer(teacher.get_submodule("encoder"), frozen=True)
        latents = [to_grid(model.run("pixel_latent", features=part)["pixel_latent"]) for part in features.split(64)]
        expected = [encode(images=part)["tokenizer_latent"] for part in scenes.split(64)]
        measured["teacher"] = float((torch.cat(latents) - torch.cat(expected)).square().mean())
    return measured


def _gradient_energy(images: Tensor) -> Tensor:
    """Return the mean squared difference of neighbouring pixels of images (n, 3, S, S)."""
    return images.diff(dim=-1).square().mean() + images.diff(dim=-2).square().mean()
