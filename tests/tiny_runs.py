"""Real training runs small enough for a test: a few scenes, a pixel autoencoder from the seed, a dozen steps.

Everything goes through `spar_scale.training.trainer.train`, as on a cluster. A world of processes
trains several recipes one after another, so its start is paid once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nano  # noqa: F401  makes the preset known, also in the processes that train
from launching import preload

from spar_scale.runs.processes import BEFORE_FORKS

preload(*BEFORE_FORKS, "spar_scale.stages.tokenizer", "spar_scale.training.trainer")


def make_data(folder: Path, scenes: int = 96, edits: int = 0) -> str:
    """Write a few scenes, and edits where asked for, as shards; return the glob of the scenes."""
    from spar_scale.data.shapes_world import World
    from spar_scale.data.shards import make_world

    make_world(World(size=32, seed=5, scenes=scenes, heldout=0, edits=edits, per_shard=32), folder)
    return str(folder / "scenes-*.tar")


def make_autoencoder(folder: Path) -> Path:
    """Write a pixel autoencoder with seeded weights in the published layout."""
    from spar_scale.models.initialise import initialise
    from spar_scale.models.presets import PRESETS

    autoencoder = PRESETS["tiny"].autoencoder
    model = autoencoder.build()
    initialise(model, 3)
    autoencoder.save(model, folder)
    return folder


def recipe_values(run_dir: Path, shards: str, autoencoder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe of phase init as nested values; `changes` are dotted keys with `__` for the dot."""
    values: dict[str, Any] = {
        "stage": "tokenizer",
        "phase": "init",
        "model": {"preset": "tiny", "pretrained": {"pixel_autoencoder": str(autoencoder)}},
        "run_dir": str(run_dir),
        "seed": 1,
        "global_batch": 12,
        "train": {"steps": 10, "log_every": 5},
        "optimizer": {
            "name": "adamw",
            "lr": 1e-3,
            "min_lr": 1e-5,
            "warmup_steps": 3,
            "weight_decay": 0.01,
            "clip": 0.5,
            "groups": {"fusion": 0.3},
            "ema_decay": 0.9,
        },
        "objective": {"perceptual_weight": 0.5, "pixel_alignment_weight": 1.0},
        "data": {"task_block": 7, "sources": [{"name": "images", "shards": shards}], "workers": 0},
        "checkpoint": {"every": 5, "keep": 3},
        "parallel": {"zero": 1, "micro_batch": 2},
        "tracking": {"mirror": False},
    }
    for key, value in changes.items():
        place = values
        *parents, last = key.split("__")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return values


SOURCES: dict[str, dict[str, str]] = {
    "bootstrap/mllm": {"questions": "scenes", "captions": "scenes", "edits": "edits", "texts": "scenes"},
    "align/joint": {"generation": "scenes", "editing": "edits"},
    "instruct/joint": {"generation": "scenes", "editing": "edits"},
}
"""Source -> the shards it reads, where it is not `images` of the scenes."""
OBJECTIVES: dict[str, dict[str, Any]] = {
    "bootstrap/autoencoder": {"perceptual_weight": 0.5, "latent_power_weight": 1e-3},
    "bootstrap/diffusion": {"caption_dropout": 0.2},
    "tokenizer/init": {"perceptual_weight": 0.5},
    "tokenizer/decoder": {"perceptual_weight": 0.5},
    "tokenizer/encoder": {"perceptual_weight": 0.5},
    "align/connector": {"caption_dropout": 0.2},
    "align/joint": {"caption_dropout": 0.2, "align_weight": 0.5, "align_block": 3},
    "instruct/joint": {"caption_dropout": 0.2, "align_weight": 0.5, "align_block": 3},
}


def phase_values(
    run_dir: Path, phase: str, data: Path, parts: dict[str, str], preset: str = "tiny", **changes: Any
) -> dict[str, Any]:
    """A recipe of any "stage/phase" on the shards under `data`, with its pretrained parts out of `parts`."""
    from tiny_parts import parts_of

    stage, name = phase.split("/")
    sources = SOURCES.get(phase, {"images": "scenes"})
    general: dict[str, Any] = {
        "stage": stage,
        "phase": name,
        "model": {"preset": preset, "pretrained": parts_of(stage, name, parts)},
        "objective": dict(OBJECTIVES.get(phase, {})),
        "optimizer__groups": {},
        "data": {
            "task_block": 7 if len(sources) == 1 else 5,
            "sources": [{"name": source, "shards": str(data / f"{kind}-*.tar")} for source, kind in sources.items()],
            "workers": 0,
        },
    }
    return recipe_values(run_dir, "", Path(), **(general | changes))


def train_all(rank: int, world: int, recipes: list[dict[str, Any]]) -> int:
    """Train recipes one after another in this process of a world."""
    from parallel.launch.world import stop
    from spar_scale.config.recipe import Recipe
    from spar_scale.training.trainer import train

    for values in recipes:
        assert train(Recipe.model_validate_json(json.dumps(values))) == 0
    stop()
    return rank


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Every step's line."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def consumed(run_dir: Path) -> list[int]:
    """All sample numbers of the surviving lineage, in the order of their steps."""
    lines = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    return [number for line in lines for first, end in line["ranges"] for number in range(first, end)]
