"""Bad input through the command line: one message, exit code 2, no traceback, nothing lost or executed."""

from __future__ import annotations

import contextlib
import io
import json
import re
import resource
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from launching import run_world
from PIL import Image
from tiny_runs import make_autoencoder, make_data, metrics, phase_values, recipe_values

from spar_scale.data.prompts import build_tokenizer
from spar_scale.files import random_weights
from spar_scale.models.presets import PRESETS

Case = tuple[str, list[str], int | None]
"""Name, arguments, and the largest file in bytes that the process may write."""


def run_cases(rank: int, world: int, cases: list[Case]) -> dict[str, tuple[int, str]]:
    """Run command lines one after another in one process; name -> (exit code, stderr)."""
    from spar_scale.cli import main

    results = {}
    for name, arguments, limit in cases:
        errors, output = io.StringIO(), io.StringIO()
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output):
                code = main(arguments)
        except BaseException as error:
            code = -1
            errors.write(f"escaped: {error!r}")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
        results[name] = code, errors.getvalue()
    return results


def damage_copy(run: Path, name: str, change: Callable[[Path], Any]) -> Path:
    """A copy of the run whose checkpoints are changed."""
    copy = run.parent / name
    shutil.copytree(run, copy)
    for path in sorted((copy / "checkpoints").glob("step-*")):
        change(path)
    return copy


def flip(path: Path) -> None:
    file = next(path.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file but those a start may touch (lock, recipe, an empty log)."""
    touched = {"lock", "recipe.yaml", "bad_samples.jsonl"}
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in touched]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


EXPECTED = {
    "unknown key": r"train\.stepz: .*unknown key.*did you mean 'steps'",
    "wrong type": r"train\.steps: found \"many\"",
    "two errors at once": r"(?s)2 errors.*seed.*precision",
    "not YAML": r"bad\.yaml",
    "a Python tag": r"python/object",
    "no such recipe": r"nowhere\.yaml",
    "empty shard": r"empty-0\.tar",
    "truncated shard": r"cut-0\.tar",
    "not a tar": r"text-0\.tar",
    "no index": r"spar-scale data index",
    "stale index": r"stale-0\.tar",
    "no shards": r"error: data\.sources: source 'images': shards: .*none-\*\.tar: no such shard",
    "too many bad images": r"guards\.max_bad_fraction",
    "no usable image": r"step 1: none of its 12 samples could be used.*bad_samples\.jsonl",
    "not an image": r"text\.png: not an image",
    "checkpoint of another model": r"another model",
    "checkpoint with a missing file": r"missing",
    "checkpoint with flipped bits": r"damaged",
    "verify flipped bits": r"sha256|damaged|content",
    "full disk": r"File too large",
    "run directory in the way": r"in-the-way",
    "recipe of another run": r"optimizer\.lr",
    "wrong kind of repository": r"pretrained\.mllm: .*model_type = internvl_chat, .*whose name ends in -hf",
    "wrong vocabulary": r"pretrained\.mllm: .*tokenizer\.json has <IMG_CONTEXT> = 63, preset 'tiny' needs 65",
    "missing perceptual file": r"pretrained\.perceptual: found none of vgg16\*.*; found none of convnext_small\*",
    "wrong epsilon": r"pretrained\.mllm: .*vision_config\.layer_norm_eps = 1e-05, preset 'tiny' needs 1e-06",
    "pickled weights only": r"pretrained\.pixel_autoencoder: .*holds pickled weights only .*\.bin",
    "half precision only": r"pretrained\.pixel_autoencoder: .*holds the variant 'fp16' only",
    "tensor that divides no heads": r"parallel\.tensor: .*; nearest that fit: parallel\.tensor=2",
    "layout that does not fit": r"parallel: .*; nearest that fit: parallel\.tensor=1 parallel\.pipeline=1",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bad_input")
    shards, autoencoder = make_data(folder / "data"), make_autoencoder(folder / "autoencoder")
    good = Path(shards).parent / "scenes-00000.tar"

    def recipe(name: str, shards: str = shards, **changes: Any) -> str:
        path = folder / f"{name}.yaml"
        short = {"train": {"steps": 2}, "checkpoint": {"every": 1}}
        values = recipe_values(folder / name, shards, autoencoder, **short, **changes)
        path.write_text(yaml.safe_dump(values))
        return str(path)

    def shard(name: str, content: bytes) -> str:
        path = folder / "shards" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return str(path)

    model = {"stage": "bootstrap", "phase": "autoencoder", "model": {"preset": "tiny"}}
    objective = {"perceptual_weight": 0.5}
    unlike = recipe("autoencoder_run", **model, objective=objective, optimizer__groups={})
    good_runs: list[Case] = [("run", ["train", recipe("run")], None), ("unlike", ["train", unlike], None)]
    made = run_world(1, run_cases, good_runs, initialise=False)[0]
    assert {code for code, _ in made.values()} == {0}, made
    run = folder / "run"
    assert len(metrics(run)) == 2
    wrong_kind, wrong_epsilon = folder / "chat", folder / "epsilon"
    for mllm, section, change in (
        (wrong_kind, None, {"model_type": "internvl_chat"}),
        (wrong_epsilon, "vision_config", {"layer_norm_eps": 1e-5}),
    ):
        random_weights.write_mllm(mllm, PRESETS["tiny"])
        config = json.loads((mllm / "config.json").read_text())
        (config[section] if section else config).update(change)
        (mllm / "config.json").write_text(json.dumps(config))
    for name in ("bin", "fp16.safetensors"):
        part = shutil.copytree(autoencoder, folder / name)
        (part / "diffusion_pytorch_model.safetensors").rename(part / f"diffusion_pytorch_model.{name}")
    trap = folder / "executed"
    (folder / "bad.yaml").write_text("train: {steps: 3\n  - no")
    (folder / "tag.yaml").write_text(f'stage: !!python/object/apply:os.mkdir ["{trap}"]\n')
    (folder / "in-the-way").write_text("a file")
    (folder / "text.png").write_text("no image")
    picture = io.BytesIO()
    Image.linear_gradient("L").resize((32, 32)).convert("RGB").save(picture, "png")
    (folder / "shards").mkdir()
    for name, even in (("broken", picture.getvalue()), ("none", b"no image")):
        with tarfile.open(folder / "shards" / f"{name}-0.tar", "w") as tar:
            for index in range(24):
                content = b"no image" if index % 2 else even
                info = tarfile.TarInfo(f"{index:08d}.png")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    stale = shard("stale-0.tar", good.read_bytes())
    lost = damage_copy(run, "lost", lambda path: next(path.glob("*.distcp")).unlink())
    flipped = damage_copy(run, "flipped", flip)
    other = damage_copy(run, "other", shutil.rmtree)
    for path in (folder / "autoencoder_run" / "checkpoints").glob("step-*"):
        shutil.copytree(path, other / "checkpoints" / path.name)
    kept = {name: snapshot(folder / name) for name in ("run", "lost", "flipped", "other")}
    before = [
        ("index broken", ["data", "index", str(folder / "shards" / "broken-0.tar")], None),
        ("index none", ["data", "index", str(folder / "shards" / "none-0.tar")], None),
        ("index stale", ["data", "index", stale], None),
    ]
    run_world(1, run_cases, before, initialise=False)
    Path(stale).write_bytes(good.read_bytes() + b"\0" * 512)

    words = folder / "vocabulary"  # a language model's directory, in which two marks have changed places
    build_tokenizer().save_pretrained(str(words))
    (words / "config.json").write_text("{}")
    table = json.loads((words / "tokenizer.json").read_text())
    places = table["model"]["vocab"]
    places["<img>"], places["<IMG_CONTEXT>"] = places["<IMG_CONTEXT>"], places["<img>"]
    for token in table["added_tokens"]:
        token["id"] = places[token["content"]]
    (words / "tokenizer.json").write_text(json.dumps(table))
    parts = {"mllm": str(words), "diffusion": str(words), "pixel_autoencoder": str(autoencoder)}
    aligned = str(folder / "aligned.yaml")
    Path(aligned).write_text(yaml.safe_dump(phase_values(folder / "j", "align/connector", folder / "data", parts)))

    def again(name: str, **changes: Any) -> list[str]:
        """Train the copy `name` one step further than it got."""
        copied = (folder / name / "recipe.yaml").read_text().replace(str(run), str(folder / name))
        (folder / name / "recipe.yaml").write_text(copied)
        return ["train", str(folder / name / "recipe.yaml"), *(f"{key}={value}" for key, value in changes.items())]

    cases: list[Case] = [
        ("unknown key", ["train", recipe("run"), "train.stepz=3"], None),
        ("wrong type", ["train", recipe("run"), "train.steps=many"], None),
        ("two errors at once", ["train", recipe("run"), "precision=fp64", "seed=-1"], None),
        ("not YAML", ["train", str(folder / "bad.yaml")], None),
        ("a Python tag", ["train", str(folder / "tag.yaml")], None),
        ("no such recipe", ["train", str(folder / "nowhere.yaml")], None),
        ("empty shard", ["data", "index", shard("empty-0.tar", b"")], None),
        ("truncated shard", ["data", "index", shard("cut-0.tar", good.read_bytes()[:3000])], None),
        ("not a tar", ["data", "index", shard("text-0.tar", b"no tar at all" * 100)], None),
        ("no index", ["train", recipe("a", shard("plain-0.tar", good.read_bytes()))], None),
        ("stale index", ["train", recipe("b", stale)], None),
        ("no shards", ["train", recipe("c", str(folder / "none-*.tar"))], None),
        (
            "too many bad images",
            ["train", recipe("d", str(folder / "shards" / "broken-0.tar")), "train.steps=12", "train.log_every=1"],
            None,
        ),
        ("no usable image", ["train", recipe("h", str(folder / "shards" / "none-0.tar"))], None),
        ("not an image", ["reconstruct", str(run), str(folder / "text.png"), "-o", str(folder / "x.png")], None),
        ("checkpoint of another model", again("other"), None),
        ("checkpoint with a missing file", again("lost"), None),
        ("checkpoint with flipped bits", again("flipped"), None),
        ("verify flipped bits", ["checkpoint", "verify", str(flipped)], None),
        ("full disk", ["train", recipe("e")], 200_000),
        ("run directory in the way", ["train", recipe("f"), f"run_dir={folder / 'in-the-way' / 'run'}"], None),
        ("recipe of another run", ["train", recipe("run"), "optimizer.lr=0.5"], None),
        ("wrong kind of repository", ["train", recipe("i"), f"model.pretrained.mllm={wrong_kind}"], None),
        ("wrong vocabulary", ["train", aligned, "run_dir=" + str(folder / "j")], None),
        (
            "missing perceptual file",
            ["train", recipe("k"), "objective.perceptual=lpips_convnext", f"model.pretrained.perceptual={folder}"],
            None,
        ),
        ("wrong epsilon", ["train", recipe("i"), f"model.pretrained.mllm={wrong_epsilon}"], None),
        ("pickled weights only", ["train", recipe("i"), f"model.pretrained.pixel_autoencoder={folder / 'bin'}"], None),
        (
            "half precision only",
            ["train", recipe("i"), f"model.pretrained.pixel_autoencoder={folder / 'fp16.safetensors'}"],
            None,
        ),
        ("tensor that divides no heads", ["train", recipe("g"), "parallel.tensor=3"], None),
        ("layout that does not fit", ["train", recipe("g"), "parallel.pipeline=3"], None),
    ]
    assert [name for name, _, _ in cases] == list(EXPECTED)
    found = run_world(1, run_cases, cases, initialise=False)[0]
    assert lost.exists()
    return {"found": found, "folder": folder, "kept": kept, "trap": trap}


@pytest.mark.parametrize("name", EXPECTED)
def test_bad_input_is_refused_with_one_message(results: dict[str, Any], name: str) -> None:
    code, errors = results["found"][name]
    print(f"{name}: {errors.strip()}")
    assert code == 2
    assert errors.count("error:") == 1
    assert "Traceback" not in errors
    assert re.search(EXPECTED[name], errors)


def test_nothing_was_executed_lost_or_left_half_done(results: dict[str, Any]) -> None:
    folder = results["folder"]
    assert not results["trap"].exists()
    for name, before in results["kept"].items():
        assert snapshot(folder / name) == before
    assert not list((folder / "e" / "checkpoints").glob("step-*"))
    assert not list(folder.glob("*/checkpoints/.tmp-*"))
    assert not (folder / "x.png").exists()
    assert not any((folder / name).exists() for name in ("a", "b", "c")), "a start without its shards left a run"
    assert (folder / "in-the-way").read_text() == "a file"


def test_bad_samples_are_listed_with_shard_and_key(results: dict[str, Any]) -> None:
    lines = [json.loads(line) for line in (results["folder"] / "d" / "bad_samples.jsonl").read_text().splitlines()]
    assert len(lines) == 6  # half of the first step, after which the run stops
    assert {line["shard"].rsplit("/", 1)[1] for line in lines} == {"broken-0.tar"}
    assert lines[0]["key"].isdigit()
