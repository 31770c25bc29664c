"""Free captions and instructions in the shards that the public sets have train through the phases.

The shards are those of BLIP3o (`jpg`, `txt`), of the edit triplets and pairs that SPAR's authors pack (a PNG may be
called `.jpg`), and of img2dataset (`json`). Prompts are ChatML in the published vocabulary.
The preset has the published vocabulary, ids and pixel shuffle, and the widths of `nano`.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import run_world
from nano import NANO
from packed import packed
from PIL import Image
from published_text import write_published
from tiny_parts import make_parts
from tiny_runs import metrics, phase_values, train_all
from webdataset.writer import ShardWriter

from parallel.errors import UserError
from spar_scale.config.recipe import Recipe
from spar_scale.data.loader import Loader
from spar_scale.data.prompts import build_tokenizer
from spar_scale.data.spec import sources_of
from spar_scale.data.tar_index import index_shard, write_index
from spar_scale.inference.ask import answer
from spar_scale.inference.drawing import edit, generate
from spar_scale.inference.sampler import seeded_noise
from spar_scale.models.presets import PRESETS, resized
from spar_scale.runs.curves import LOSS_RELATIVE, NORM_RELATIVE, curve, distance
from spar_scale.stages import build, meta_stage
from spar_scale.stages.forward import Forward
from spar_scale.training.export import recipe_of, trained_forward

NANO_TEXT = resized(
    NANO,
    name="nano_text",
    language={"vocab_size": 151674, "image_token_id": 151667, "max_positions": 256},
    conditioning={"max_words": 64},
)
PRESETS["nano_text"] = NANO_TEXT
CAPTIONS = (
    "A cat sleeps on a blue sofa, next to 2 books & a lamp.", "Ein rotes Fahrrad lehnt an der Wand.",
    "\u4e00\u53ea\u72d7\u5728\u96ea\u5730\u91cc\u8dd1", "A sign that reads <|im_end|> and <IMG_CONTEXT>",
    "PHOTO: mountains; dawn.", "Zo\u00eb's caf\u00e9 at night",
)  # fmt: skip
SOURCES: dict[str, dict[str, Any]] = {
    "blip3o": {"task": "generation"},
    "sharegpt": {"task": "generation"},
    "img2dataset": {"task": "generation"},
    "listed": {"task": "generation", "text": ["json:long", "json:short"]},
    "edits": {"task": "editing"},
}
INSTRUCTIONS = ("Make the sofa green.", "Remove the lamp!", "Add 3 birds to the sky", "Turn it into a watercolour")


def write_shards(folder: Path, name: str, samples: list[dict[str, bytes]]) -> None:
    with ShardWriter(str(folder / f"{name}-%05d.tar"), maxcount=4, verbose=0, encoder=False) as writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": f"{number:08d}", **sample})
    for shard in folder.glob(f"{name}-*.tar"):
        write_index(str(shard), index_shard(str(shard)))


def picture(seed: int, kind: str = "jpeg") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((48, 32)).save(buffer, kind)
    return buffer.getvalue()


def write_public_shards(folder: Path) -> None:
    records = [{"caption": one, "status": "success", "width": 48, "key": f"{n:09d}"} for n, one in enumerate(CAPTIONS)]
    listed = [json.dumps({"long": one, "short": ["a photograph", "a picture"]}).encode() for one in CAPTIONS]
    edits = [
        {"input.jpg": picture(10 + n), "output.jpg": picture(20 + n), "txt": instruction.encode()}
        for n, instruction in enumerate(INSTRUCTIONS)
    ]
    write_shards(folder, "blip3o", [{"jpg": picture(n), "txt": one.encode()} for n, one in enumerate(CAPTIONS)])
    write_shards(
        folder, "sharegpt", [{"jpg": picture(n, "png"), "txt": one.encode()} for n, one in enumerate(CAPTIONS)]
    )
    write_shards(
        folder, "img2dataset", [{"JPEG": picture(n), "json": json.dumps(one).encode()} for n, one in enumerate(records)]
    )
    write_shards(folder, "listed", [{"webp": picture(n, "webp"), "json": one} for n, one in enumerate(listed)])
    write_shards(folder, "edits", edits)


def train_free(rank: int, world: int, recipes: list[dict[str, Any]]) -> int:
    """Train in a worker, which knows the preset because this module imports it."""
    return train_all(rank, world, recipes)


def values(folder: Path, name: str, phase: str, **changes: Any) -> dict[str, Any]:
    parts = {part: str(folder / "parts" / part) for part in ("mllm", "pixel_autoencoder", "tokenizer", "diffusion")}
    sources = [
        {"name": source, "shards": str(folder / f"{source}-*.tar"), "fit": "stretch", **entry}
        for source, entry in SOURCES.items()
        if entry["task"] == "generation" or phase == "align/joint"
    ]
    changes |= {"train": {"steps": 4}, "checkpoint": {"every": 4}, "global_batch": 15}
    changes |= {"data__task_block": 3, "data__sources": sources}
    return phase_values(folder / name, phase, folder, parts, "nano_text", **changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("free")
    write_public_shards(folder)
    make_parts(folder / "parts", NANO_TEXT)
    write_published(folder / "parts" / "mllm", request.config.cache.mkdir("published-tokenizer"))
    alone = [values(folder, name.replace("/", "-"), name) for name in ("align/connector", "align/joint")]
    run_world(1, train_free, alone, initialise=False)
    two = {"parallel": {"zero": 1, "pipeline": 2, "micro_batch": 2}}
    run_world(2, train_free, [values(folder, "joint-pipeline", "align/joint", **two)], initialise=False)
    return folder


@pytest.fixture(scope="module")
def joint(runs: Path) -> Forward:
    return trained_forward(runs / "align-joint")[0]


@pytest.mark.parametrize(("name", "sources"), [("align-connector", 4), ("align-joint", 5)])
def test_every_sample_of_every_source_trains(runs: Path, name: str, sources: int):
    lines = metrics(runs / name)
    assert len(lines) == 4 and all(np.isfinite(line["loss"]) for line in lines)
    assert (runs / name / "bad_samples.jsonl").read_text() == ""
    recipe = recipe_of(runs / name)
    loader = Loader(sources_of(recipe), meta_stage(recipe).sample, recipe.seed, 15, 3, 3, 0, 1, 0, 0, 4)
    assert {loader.order.locate(number).source for number in range(4 * 15)} == set(range(sources))


def test_the_pipeline_trains_the_same_curve(runs: Path):
    loss, norm = distance(curve(runs / "joint-pipeline"), curve(runs / "align-joint"))
    assert loss <= LOSS_RELATIVE and norm <= NORM_RELATIVE


def test_an_instruction_shows_the_picture_and_the_picture_changes_captions_and_loss(runs: Path):
    stage = build(Recipe.model_validate_json(json.dumps(values(runs, "new", "align/joint"))))
    forward = Forward(stage, NANO_TEXT)
    prompt = forward.text.editing_prompt(INSTRUCTIONS[0], NANO_TEXT.image_tokens)
    assert prompt.count(151667) == NANO_TEXT.image_tokens == 16
    pictures = torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    captions = [forward.condition([prompt], one)[0] for one in pictures]
    assert (captions[0] - captions[1]).abs().max() > 1e-3
    again = forward.condition([prompt], pictures[0])[0]
    assert torch.equal(again, captions[0])
    target = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(1, *NANO_TEXT.latent_shape, generator=torch.Generator().manual_seed(2))
    slots = {**packed([prompt]), "timestep_draw": torch.zeros(1), "latent_noise": noise}
    losses = [
        forward.run("flow_matching", images=torch.stack([target, one], 1), **slots)["flow_matching"] for one in pictures
    ]
    assert losses[0] != losses[1]


def test_a_run_draws_edits_and_answers_with_free_text(joint: Forward):
    noise, sampling = seeded_noise(NANO_TEXT.latent_shape, [0, 1]), NANO_TEXT.sampling
    drawn = generate(joint, ["A red bicycle, in the rain.", "\u732b"], noise, sampling)
    source = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    edited = edit(joint, source, ["Make it night.", "Add <IMG_CONTEXT>"], noise, sampling)
    assert drawn.shape == edited.shape == (2, 3, 32, 32) and drawn.isfinite().all() and edited.isfinite().all()
    assert isinstance(answer(joint, Image.new("RGB", (50, 40), "red"), "What's in the picture?"), str)


def test_a_tokenizer_of_another_vocabulary_is_refused_before_weights_are_read(runs: Path, tmp_path: Path):
    """By all that build a stage: train, plan and the checks of doctor and submit."""
    values_of_other = values(runs, "other", "align/joint")
    mllm = tmp_path / "mllm"
    mllm.mkdir()
    build_tokenizer().save_pretrained(str(mllm))
    (mllm / "config.json").write_text("{}")
    values_of_other["model"]["pretrained"]["mllm"] = str(mllm)
    recipe = Recipe.model_validate_json(json.dumps(values_of_other))
    for make in (build, meta_stage):
        with pytest.raises(UserError, match=r"has <IMG_CONTEXT> = 65, preset 'nano_text' needs 151667"):
            make(recipe)
