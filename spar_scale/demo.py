"""The main job in miniature: make the world, train all stages through the one trainer, show what was learned.

Sizes are recipes: `demo` reads recipes/tiny, `smoke` reads recipes/smoke. Everything is resumable:
run again with the same `--out`, it goes on where it stopped.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from spar_scale.chain import PHASES, Chain
from spar_scale.data.commands import make
from spar_scale.data.shapes_world import World
from spar_scale.evaluation.held_out import held_out_terms
from spar_scale.evaluation.reconstruction import grid, image_psnr, psnr, to_image
from spar_scale.evaluation.scenes import held_out_scenes, photograph
from spar_scale.evaluation.understanding import answers_right, by_type, held_out_questions, own_features
from spar_scale.inference.drawing import generate
from spar_scale.inference.pipeline import reconstruct, reconstruct_image
from spar_scale.inference.sampler import seeded_noise
from spar_scale.models.presets import PRESETS
from spar_scale.models.unified import SPAR
from spar_scale.settings import load
from spar_scale.stages.parts import preset_of
from spar_scale.training.export import recipe_of, trained_model

SCENES = 256  # held-out scenes behind a score
SHOWN = 16  # in a grid
RECONSTRUCTIONS = ("bootstrap_autoencoder", "tokenizer_init", "tokenizer_decoder", "tokenizer_encoder")


def run(out: Path, size: str, seed: int) -> None:
    """Make the world under `out/data`, train every phase, write `scores.json` and the pictures beside it."""
    started = time.monotonic()
    chain = Chain(out, size, seed)
    make(load(chain.folder / "world.yaml", World), out / "data")
    for phase in PHASES:
        chain.train(phase)
    scores = {**reconstructions(out), **understanding(out), **generation(out)}
    scores |= {f"core_seconds.{phase}": round(value, 1) for phase, value in chain.core_seconds.items()}
    (out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    for name, value in scores.items():
        print(f"{name:42} {value}")
    print(f"pictures: {out / 'reconstructions.png'} {out / 'generated.png'}")
    print(f"total {time.monotonic() - started:.0f} s")


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
