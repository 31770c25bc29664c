"""The main job in miniature: make the world, train all stages through the one trainer, score and show what was learned.

Sizes are recipes: `demo` reads recipes/tiny, `smoke` recipes/smoke, `full` recipes/full. All of it can be
interrupted: the same command again goes on where it stopped, and counts what was spent before.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from spar_scale.board import clock
from spar_scale.chain import PHASES, Chain
from spar_scale.data.commands import make
from spar_scale.data.shapes_world import World
from spar_scale.data.storage import write_atomic
from spar_scale.evaluation.held_out import held_out_terms
from spar_scale.evaluation.reconstruction import grid, image_psnr, psnr, to_image
from spar_scale.evaluation.scenes import held_out_scenes, photograph
from spar_scale.evaluation.understanding import answers_right, by_type, held_out_questions, own_features
from spar_scale.inference.drawing import generate
from spar_scale.inference.pipeline import reconstruct, reconstruct_image
from spar_scale.inference.sampler import seeded_noise
from spar_scale.models.presets import PRESETS
from spar_scale.models.unified import SPAR
from spar_scale.processes import Step, available_cores, run_steps, threads
from spar_scale.settings import load
from spar_scale.spending import Spending, spent
from spar_scale.stages.parts import preset_of
from spar_scale.training.export import recipe_of, trained_model

SCENES = 256  # held-out scenes behind a score
SHOWN = 16  # in a grid
RECONSTRUCTIONS = ("bootstrap_autoencoder", "tokenizer_init", "tokenizer_decoder", "tokenizer_encoder")
PACKAGES = ("torch", "deepspeed", "transformers", "diffusers", "webdataset", "numpy", "pillow", "pydantic")
BEFORE_FORKS = ("deepspeed.pipe", "torch._dynamo", "torch._inductor.compile_fx", "spar_scale.stages.align")
SCENES_PER_S, EVALUATION_S = 1500, 60.0  # estimates
EVALUATION, TRAINING, SCORES = "evaluation", "training.json", "scores.json"


def run(out: Path, size: str, seed: int, jobs: int | None = None) -> None:
    """Make the world under `out/data`, train every phase, write `training.json`, `scores.json` and `report.html`.

    `jobs` steps run side by side; the default is two, one where there is one core. Raises UserError for a size
    without recipes, and for what a step refuses.
    """
    jobs = jobs or min(2, available_cores())
    chain = Chain(out, size, seed)
    steps, whole = steps_of(chain), Spending(out)
    _import_before_forks()

    def keep(step: Step | None = None) -> None:
        whole.record()
        _write(out / TRAINING, _account(chain, size, jobs, steps))
        if step is not None and step.name == EVALUATION:
            _write(out / SCORES, _scores(out) | _core_seconds(steps))

    keep()
    run_steps(steps, jobs, ended=keep)
    keep()
    _report(out)
    for name, value in _scores(out).items():
        print(f"{name:42} {value}")
    total, wall = _core_seconds(steps)["core_seconds.total"], clock(spent(out).wall_seconds)
    print(f"{total:.0f} core-seconds of training; {wall} for all, with scores and report\n{out / 'report.html'}")


def steps_of(chain: Chain) -> list[Step]:
    """Everything that the demo does, in an order in which it may be done."""
    out, world = chain.out, load(chain.folder / "world.yaml", World)
    samples, scored = world.scenes + world.heldout + world.edits, out / "evaluation"

    def is_scored() -> bool:
        return spent(scored).finished and (out / SCORES).exists()

    return [
        Step("data", out / "data", functools.partial(make, world, out / "data"), seconds=1 + samples / SCENES_PER_S),
        *chain.steps(),
        Step(EVALUATION, scored, functools.partial(_evaluate, out), PHASES, EVALUATION_S, is_scored),
    ]


def command(out: Path, size: str, seed: int) -> str:
    """The command that makes this demo, or goes on with it."""
    return shlex.join(["spar-scale", "demo", "--out", str(out), "--size", size, "--seed", str(seed)])


def _account(chain: Chain, size: str, jobs: int, steps: Sequence[Step]) -> dict[str, Any]:
    """What `training.json` says: the command, the machine, the versions, and what each step has cost so far."""
    trained = {phase: chain.recipe(phase).train.steps for phase in PHASES}
    costs = {step.name: spent(step.folder) for step in steps}
    return {
        "command": command(chain.out, size, chain.seed),
        "size": size,
        "seed": chain.seed,
        "jobs": jobs,
        "machine": f"{platform.system()} {platform.machine()}, {available_cores()} cores",
        "threads": threads(jobs),
        "versions": {"python": platform.python_version(), **_versions()},
        "wall_seconds": spent(chain.out).wall_seconds,
        "phases": {
            name: {"steps": trained.get(name, 0), "core_seconds": cost.core_seconds, "wall_seconds": cost.wall_seconds}
            for name, cost in costs.items()
        },
    }


def _core_seconds(steps: Sequence[Step]) -> dict[str, float]:
    """Core-seconds of everything that training needs, and their sum; scoring and showing it are not in it."""
    costs = {step.name: spent(step.folder).core_seconds for step in steps if step.name != EVALUATION}
    costs["total"] = round(sum(costs.values()), 2)
    return {f"core_seconds.{name}": value for name, value in costs.items()}


def _scores(out: Path) -> dict[str, float]:
    return json.loads((out / SCORES).read_text())


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _import_before_forks() -> None:
    """Import here what every step needs, once; nothing of it may compute or look at a GPU, which no fork survives."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    from parallel.launch import device_type

    if device_type() == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for module in BEFORE_FORKS:
        importlib.import_module(module)
    from transformers.utils import logging

    logging.disable_progress_bar()


def _evaluate(root: Path) -> None:
    if importlib.util.find_spec("spar_scale.evaluation.evaluate") is None:
        _write(root / SCORES, {**reconstructions(root), **understanding(root), **generation(root)})
        return
    from spar_scale.evaluation.evaluate import evaluate  # pyright: ignore[reportMissingImports]

    evaluate(root)


def _report(root: Path) -> None:
    if importlib.util.find_spec("spar_scale.evaluation.report") is not None:
        from spar_scale.evaluation.report import write_report

        write_report(root)


def reconstructions(out: Path) -> dict[str, Any]:
    """PSNR in dB of held-out scenes and of a photograph after each phase that has a decoder, and the pictures."""
    scenes, photo = held_out_scenes(out / "data", SCENES)[0], photograph()
    rows, labels = [[to_image(scene) for scene in scenes[:SHOWN]]], ["held-out scenes"]
    photos, scores = [photo], {}
    for phase in RECONSTRUCTIONS:
        model: Any = trained_model(out / phase)[0]
        made = torch.cat([reconstruct(model, part) for part in scenes.split(64)])
        rows.append([to_image(scene) for scene in made[:SHOWN]])
        photos.append(reconstruct_image(model, photo, scenes.shape[-1]))
        on_scenes, on_photo = float(psnr(made, scenes).mean()), image_psnr(photos[-1], photo)
        labels.append(f"{phase}: PSNR {on_scenes:.2f} dB (photograph {on_photo:.2f} dB)")
        scores |= {f"{phase}.psnr": round(on_scenes, 3), f"{phase}.psnr_photograph": round(on_photo, 3)}
    label = "photograph (china.jpg): source, " + ", ".join(RECONSTRUCTIONS)
    _below(grid(rows, labels, zoom=2), grid([photos], [label])).save(out / "reconstructions.png")
    return scores


def understanding(out: Path) -> dict[str, Any]:
    """The share of right answers: with the language model's own vision tower, with the tokenizer's, and blind."""
    mllm: Any = trained_model(out / "bootstrap_mllm")[0]
    tokenizer: Any = trained_model(out / "tokenizer_encoder")[0]
    preset = PRESETS[tokenizer.preset]
    questions = held_out_questions(str(out / "data" / "heldout-*.tar"), SCENES, preset.image_size)
    scores: dict[str, Any] = {}
    for name, seen in (("before", own_features(mllm)), ("after", tokenizer.features), ("blind", None)):
        right = answers_right(mllm.model.language_model, mllm.lm_head, seen, questions)
        scores |= {f"vqa.{name}.{kind}": round(share, 3) for kind, share in by_type(questions, right).items()}
    return scores


def generation(out: Path) -> dict[str, Any]:
    """The held-out flow-matching loss under right and under shuffled prompts, and pictures of held-out captions."""
    run_dir, shards = out / PHASES[-1], {"generation": str(out / "data" / "heldout-*.tar")}
    scores = {
        f"flow.{name}": round(float(held_out_terms(run_dir, shards, SCENES, shuffled)["flow_matching"].mean()), 4)
        for name, shuffled in (("right", False), ("shuffled", True))
    }
    model = trained_model(run_dir)[0]
    assert isinstance(model, SPAR)
    scenes, captions = held_out_scenes(out / "data", SHOWN)
    noise = seeded_noise(model.latent_shape, range(SHOWN))
    drawn = generate(model, captions, noise, preset_of(recipe_of(run_dir)).sampling)
    rows, labels = [], []
    for first in range(0, SHOWN, 4):
        part = slice(first, first + 4)
        rows.append([to_image(picture) for picture in [*scenes[part], *drawn[part]]])
        labels.append(" | ".join(captions[part]))
    grid(rows, labels, zoom=3).save(out / "generated.png")
    return scores


def _below(upper: Image.Image, lower: Image.Image) -> Image.Image:
    whole = Image.new("RGB", (max(upper.width, lower.width), upper.height + lower.height), "white")
    whole.paste(upper, (0, 0))
    whole.paste(lower, (0, upper.height))
    return whole
