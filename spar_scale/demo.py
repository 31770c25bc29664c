"""The main job in miniature: make the world, train through the one trainer, show what was learned.

Sizes are recipes: `demo` reads recipes/tiny, `smoke` reads recipes/smoke. Everything is resumable:
run again with the same `--out`, it goes on where it stopped.
"""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from parallel.errors import UserError
from spar_scale import stages
from spar_scale.data.commands import make
from spar_scale.data.images import decode
from spar_scale.data.shapes_world import World
from spar_scale.data.storage import expand_shards, read_member
from spar_scale.data.tar_index import read_index
from spar_scale.evaluation.reconstruction import grid, image_psnr, psnr, to_image, to_tensor
from spar_scale.inference.pipeline import reconstruct, reconstruct_image
from spar_scale.recipe import Recipe, load_recipe
from spar_scale.settings import load
from spar_scale.training.export import trained_model
from spar_scale.training.trainer import train

log = logging.getLogger(__name__)

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
FOLDERS = {"demo": "tiny", "smoke": "smoke"}
PHASES = ("bootstrap_autoencoder", "tokenizer_init")
SHOWN, PHOTO_WIDTH = 16, 320  # scenes in the grid; pixels


def run(out: Path, size: str, seed: int) -> None:
    """Make the world under `out/data`, train both phases, write `scores.json` and `reconstructions.png`."""
    folder = RECIPES / FOLDERS[size]
    if not folder.is_dir():
        raise UserError(f"{folder}: not there; the demo runs from a checkout of the project")
    started = time.monotonic()
    make(load(folder / "world.yaml", World), out / "data")
    seconds: dict[str, float] = {"world": time.monotonic() - started}
    recipes = {}
    for phase in PHASES:
        began = os.times()
        overrides = [f"run_dir={out / phase}", f"seed={seed}", f"data.sources.0.shards={out}/data/scenes-*.tar"]
        recipes[phase] = load_recipe(folder / f"{phase}.yaml", overrides)
        train(recipes[phase])
        ended = os.times()
        seconds[phase] = sum(ended[:4]) - sum(began[:4])
    scores, picture = evaluate(out, recipes["tokenizer_init"])
    scores |= {f"core_seconds.{phase}": round(value, 1) for phase, value in seconds.items()}
    picture.save(out / "reconstructions.png")
    (out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    for name, value in scores.items():
        print(f"{name:42} {value}")
    print(f"pictures: {out / 'reconstructions.png'}   total {time.monotonic() - started:.0f} s")


def evaluate(out: Path, recipe: Recipe) -> tuple[dict[str, Any], Image.Image]:
    """PSNR of held-out scenes and of a photograph: the autoencoder, the tokenizer before and after phase init."""
    models: dict[str, nn.Module] = {
        "pixel autoencoder": trained_model(out / PHASES[0])[0],
        "tokenizer before": stages.build(recipe).model.eval(),
        "tokenizer after": trained_model(out / PHASES[1])[0],
    }
    scenes, photo = held_out(out / "data"), photograph()
    rows = [[to_image(scene) for scene in scenes[:SHOWN]]]
    labels = ["held-out scenes"]
    photos, scores = [photo], {}
    for name, model in models.items():
        made = torch.cat([reconstruct(model, part) for part in scenes.split(64)])  # type: ignore[arg-type]
        rows.append([to_image(scene) for scene in made[:SHOWN]])
        photos.append(reconstruct_image(model, photo, scenes.shape[-1]))  # type: ignore[arg-type]
        on_scenes, on_photo = psnr(made, scenes).mean().item(), image_psnr(photos[-1], photo)
        labels.append(f"{name}: PSNR {on_scenes:.2f} dB (photograph {on_photo:.2f} dB)")
        key = name.replace(" ", "_")
        scores |= {f"{key}.psnr": round(on_scenes, 3), f"{key}.psnr_photograph": round(on_photo, 3)}
    scenes_picture = grid(rows, labels, zoom=2)
    photo_label = "photograph (china.jpg): source, " + ", ".join(models)
    photo_picture = grid([photos], [photo_label])
    width = max(scenes_picture.width, photo_picture.width)
    whole = Image.new("RGB", (width, scenes_picture.height + photo_picture.height), "white")
    whole.paste(scenes_picture, (0, 0))
    whole.paste(photo_picture, (0, scenes_picture.height))
    return scores, whole


def held_out(folder: Path, count: int = 256) -> Tensor:
    """The first held-out scenes as (B, 3, S, S) in [0, 1]."""
    images = []
    for shard in expand_shards(str(folder / "heldout-*.tar")):
        index = read_index(shard)
        for member in range(min(len(index), count - len(images))):
            images.append(to_tensor(decode(read_member(shard, *index.members(member)["png"]))))
    return torch.stack(images)


def photograph() -> Image.Image:
    """A real photograph that comes with scikit-learn, scaled to PHOTO_WIDTH."""
    try:
        from sklearn.datasets import load_sample_image
    except ImportError:
        raise UserError("the demo shows a photograph that comes with scikit-learn; install the extra `demo`") from None
    picture = Image.fromarray(load_sample_image("china.jpg"))
    height = round(picture.height * PHOTO_WIDTH / picture.width)
    return picture.resize((PHOTO_WIDTH, height), Image.Resampling.BICUBIC)
