"""Ablations: what each switch of SPAR changes, over seeds, on held-out data.

A row turns switches; the phases that read them are trained again from what the others share (`chain.py`),
with the steps and the data of the full system, as many side by side as there are jobs. Each row's metrics, and
the paper's direction where it has such a row, are named here, before it runs:

    psnr          dB, held-out reconstructions                  drift   MSE of f_v against the untrained encoder's
    vqa           questions answered right from the tokenizer's features
    teacher       L_p: MSE of z_p against the pixel encoder (where there is a pixel stream)
    sharpness     gradient energy of reconstructions over that of the pictures; 1 is right
    flow          held-out flow-matching loss     gap    the same with prompts shuffled, minus it

A difference counts where it has one sign over all seeds and is larger than the spread of the full system
over the seeds; else the table says "no effect". The seeds share stage 0. The world is that of the size with
texture on its ground: a plain ground asks so little of the encoder that training it cannot be told from leaving it.
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
VALUES, MEASURING_S = "values.json", 30.0  # an estimate
_METRICS = TypeAdapter(dict[str, float])
LOWER, HIGHER, SILENT = -1, 1, 0  # what the paper says of a metric under a switch


@dataclass(frozen=True)
class Row:
    """A variant: its switches, the phase whose run is measured, and which metrics tell whether it acts.

    With each metric stands where the paper's own row goes: LOWER, HIGHER, or SILENT where it has none.
    """

    phase: str
    switches: Mapping[str, object] = field(default_factory=dict)
    metrics: Mapping[str, int] = field(default_factory=dict)


def _weighed(weight: float, rate: float) -> Row:
    """The tokenizer with L_s of another weight, and its encoder at another share of the learning rate."""
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
    "L_s 1, encoder rate 1": _weighed(1.0, 1.0),
    "L_s 0.1, encoder rate 0.1": _weighed(0.1, 0.1),
    "L_s 0.1, encoder rate 1": _weighed(0.1, 1.0),
    "L_s 0, encoder rate 1": _weighed(0.0, 1.0),
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
"""Weight of L_s and the encoder's share of the learning rate -> row: what seeing costs, and what it keeps."""


def ablate(
    out: Path,
    size: str,
    seeds: Sequence[int],
    names: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
    jobs: int | None = None,
) -> str:
    """Train and measure the rows under `out` (all, or those named and the full systems); return the tables.

    `overrides` are laid over every recipe after stage 0, so a study can be made shorter; `jobs` (two, one on one
    core) runs are trained side by side. What is done is not done again. Every value is kept in `out/ablation.json`.
    Raises UserError for a row that does not exist, an `out` that cannot be written, and for what a run refuses.
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
    values = {name: _over_seeds([_kept(file) for file in found]) for name, found in files.items()}
    content = {"size": size, "overrides": list(overrides), "seeds": list(seeds), "rows": values}
    write_file(out / RESULT, json.dumps(content, indent=1) + "\n")
    return "\n\n".join(part for part in (table(values), curve(values)) if part)


def _measured(trained: Step, out: Path, samples: int) -> Step:
    """The step that measures what another has trained."""
    folder = trained.folder.parent / "measured" / trained.folder.name
    work = functools.partial(_keep, trained.folder, out, samples, folder / VALUES)
    return Step(f"{trained.name}, measured", folder, work, (trained.name,), MEASURING_S)


def _keep(run_dir: Path, out: Path, samples: int, file: Path) -> None:
    values = measure(run_dir, out, samples)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, (json.dumps(values) + "\n"))
    print("  ".join(f"{metric} {value:.4f}" for metric, value in values.items()))


def _kept(file: Path) -> dict[str, float]:
    return read_json(file, _METRICS, f"remove {file.parent} and run the same command again")


def _over_seeds(measured: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    return {metric: [values[metric] for values in measured] for metric in measured[0]}


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
    """Reconstruction against understanding over the weight of L_s and the encoder's rate; "" where a point lacks."""
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


def acts(full: Sequence[float], other: Sequence[float]) -> bool:
    """Whether a row differs: one sign over all seeds, and on average by more than the full system's spread."""
    differences = [b - a for a, b in zip(full, other, strict=True)]
    one_sign = all(d > 0 for d in differences) or all(d < 0 for d in differences)
    return len(full) > 1 and one_sign and abs(_mean(differences)) > _spread(full)


def verdict(full: Sequence[float], other: Sequence[float], paper: int) -> str:
    """What a row shows: "reproduced" or "opposite" where the paper has a direction, else "acts"; or "no effect"."""
    if len(full) < 2:
        return "one seed"
    if not acts(full, other):
        return "no effect"
    if paper == SILENT:
        return "acts"
    return "reproduced" if (_mean(other) - _mean(full)) * paper > 0 else "opposite"


def _line(name: str, metric: str, full: Sequence[float], other: Sequence[float]) -> str:
    mean, row, paper = _mean(full), _mean(other), ROWS[name].metrics[metric]
    said = {LOWER: "lower", HIGHER: "higher", SILENT: ""}[paper]
    return (
        f"| {name} | {metric} | {mean:.4f} | {row:.4f} | {row - mean:+.4f} | {_spread(full):.4f} | {said} |"
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
        raise UserError(f"--row: '{unknown[0]}' is no row{nearest(unknown[0], ROWS)}; there are {', '.join(ROWS)}")
    phases = {ROWS[name].phase for name in names}
    return [name for name, row in ROWS.items() if name in names or (not row.switches and row.phase in phases)]


@torch.no_grad()
def _measure_tokenizer(recipe: Recipe, run_dir: Path, out: Path, samples: int) -> dict[str, float]:
    model, preset = trained_forward(run_dir)[0], preset_of(recipe)
    parts = {part: pretrained_part(recipe, part) for part in recipe.model.pretrained}
    scenes = torch.stack([scene.image for scene in scenes_of(out / "data", samples)])
    made = torch.cat([model.reconstruct(part) for part in scenes.split(64)])
    mllm = published_forward(parts["mllm"], preset)
    features, untrained = (
        torch.cat([forward.features(part) for part in scenes.split(64)]) for forward in (model, mllm)
    )
    questions = held_out_questions(str(out / "data" / "heldout-*.tar"), samples, preset.image_size)
    right = answers_right(mllm, model.features, questions)
    measured = {
        "psnr": float(psnr(made, scenes).mean()),
        "drift": float((features - untrained).square().mean()),
        "vqa": float(right.mean()),
        "sharpness": float(_gradient_energy(made) / _gradient_energy(scenes)),
    }
    if recipe.model.streams != "semantic":
        teacher, _ = preset.autoencoder.load(parts["pixel_autoencoder"])
        encode = preset.autoencoder.encoding_layer(teacher.get_submodule("encoder"), frozen=True)
        latents = [to_grid(model.run("pixel_latent", features=part)["pixel_latent"]) for part in features.split(64)]
        expected = [encode(images=part)["tokenizer_latent"] for part in scenes.split(64)]
        measured["teacher"] = float((torch.cat(latents) - torch.cat(expected)).square().mean())
    return measured


def _gradient_energy(images: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels of images (n, 3, S, S)."""
    return images.diff(dim=-1).square().mean() + images.diff(dim=-2).square().mean()
