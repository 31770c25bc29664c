"""A run on stored values is, bit for bit, the run that computes them; what does not fit is refused with the command.

The recipes are real ones of the phases that read stored values, the shards a small world with a broken picture.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import run_world
from nano import NANO
from safetensors.torch import load_file
from tiny_parts import make_parts
from tiny_runs import consumed, make_data, phase_values, train_all

from parallel.errors import UserError
from spar_scale.cli import main
from spar_scale.config.recipe import Recipe
from spar_scale.data.encoded import Encoded
from spar_scale.data.loader import Loader, Source
from spar_scale.data.tar_index import read_index
from spar_scale.models.published import replace_values
from spar_scale.runs.curves import curve
from spar_scale.stages import Stage, build
from spar_scale.training.encode import encode, made_of_stage, open_encoded

PHASES = ("align/connector", "align/joint")
BROKEN = {"scenes": (3, "png"), "edits": (5, "input.png")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """40 scenes and 40 edits in two shards each, a picture of each kind broken, and the parts of preset nano."""
    folder = tmp_path_factory.mktemp("encoded")
    make_data(folder / "data", scenes=40, edits=40)
    make_parts(folder / "parts", NANO)
    for kind, (sample, member) in BROKEN.items():
        shard = folder / "data" / f"{kind}-00000.tar"
        offset, size, _ = read_index(str(shard)).members(sample)[member]
        with shard.open("r+b") as file:
            file.seek(offset)
            file.write(bytes(size))
    return folder


def values_of(folder: Path, phase: str, run: str, **changes: Any) -> dict[str, Any]:
    parts = {part.name: str(part) for part in (folder / "parts").iterdir()}
    changes = {"parallel__micro_batch": 3, "guards__max_bad_fraction": 1.0, **changes}
    return phase_values(folder / run, phase, folder / "data", parts, "nano", **changes)


def recipe_of(folder: Path, phase: str = "align/joint", **changes: Any) -> Recipe:
    values = values_of(folder, phase, "refused", **{"data__encoded": str(folder / "stored" / phase), **changes})
    return Recipe.model_validate_json(json.dumps(values))


@pytest.fixture(scope="module")
def stored(folder) -> Path:
    """What each phase can store, under `stored`, by the command."""
    for phase in PHASES:
        encode(recipe_of(folder, phase))
    return folder / "stored"


def train_plain_and_stored(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Train each phase as it is and on stored values; then go on with the first from its middle, on stored ones."""
    found = {}
    for phase in PHASES:
        plain = values_of(folder, phase, f"plain/{phase}")
        stored = values_of(folder, phase, f"on_stored/{phase}", data__encoded=str(folder / "stored" / phase))
        train_all(rank, world, [plain, stored])
        runs = [folder / name / phase for name in ("plain", "on_stored")]
        found[phase] = [(curve(run), consumed(run)) for run in runs]
        if phase == "align/joint":
            newest = sorted((runs[0] / "checkpoints").glob("step*"))[-1]
            shutil.rmtree(newest)
            train_all(rank, world, [{**stored, "run_dir": plain["run_dir"]}])
            found["resumed"] = [found[phase][0], (curve(runs[0]), consumed(runs[0]))]
    return found


@pytest.fixture(scope="module")
def ran(folder, stored) -> dict[str, Any]:
    return run_world(1, train_plain_and_stored, folder, initialise=False)[0]


@pytest.mark.parametrize("run", [*PHASES, "resumed"])
def test_ten_steps_on_stored_values_are_bit_equal(ran, run):
    (plain, numbers), (stored, others) = ran[run]
    assert stored == plain and len(plain) == 10
    assert others == numbers


def batches(folder: Path, stage: Stage, encoded: Encoded | None) -> list[dict[str, Any]]:
    sources = [Source(name, str(folder / "data" / f"{kind}-*.tar"))
               for name, kind in (("generation", "scenes"), ("editing", "edits"))]  # fmt: skip
    return list(Loader(sources, stage.sample, 0, 20, 5, 3, 0, 1, 0, 0, 4, encoded=encoded))


def test_the_loader_changes_nothing_but_the_slots_that_are_stored(folder, stored):
    recipe = recipe_of(folder)
    stage = build(recipe)
    encoded = open_encoded(recipe, stage)
    given = stage.encoded()
    names = set(given.inputs) - set(stage.inputs)
    bad = 0
    for plain, batch in zip(batches(folder, stage, None), batches(folder, stage, encoded), strict=True):
        assert set(batch) == set(plain) - {"images"} | names
        assert all(torch.equal(batch[name], plain[name]) for name in set(batch) - names - {"errors"})
        assert [(e["key"], e["reason"][:20]) for e in batch["errors"]] == [
            (e["key"], e["reason"][:20]) for e in plain["errors"]
        ]
        bad += len(batch["errors"])
        good = torch.repeat_interleave(batch["weight"] > 0, batch["lengths"])
        assert not batch["prefix_state_2"][~good].any() and batch["prefix_state_2"][good].any(-1).all()
    assert bad


def test_the_stage_without_its_frozen_part_reads_no_picture(folder):
    stage = build(recipe_of(folder)).encoded()
    assert {*stage.inputs} == {"tokens", "lengths", "latent_noise", "timestep_draw", "latent", "target_features"} | {
        f"prefix_state_{k}" for k in range(5)
    }
    kept = {id(parameter) for layer in stage.layers for parameter in layer.parameters()}
    assert not kept & {id(parameter) for parameter in stage.model.get_submodule("tokenizer").parameters()}


def disturb(stage: Stage, part: str) -> Stage:
    parameter = next(stage.model.get_submodule(part).parameters())
    replace_values(parameter, parameter.detach() + 1)
    return stage


def with_constant(stage: Stage) -> Stage:
    assert stage.encoding is not None
    return replace(stage, encoding=replace(stage.encoding, constants={"latent_scale": 7.5}))


def with_slot(stage: Stage) -> Stage:
    assert stage.encoding is not None
    return replace(stage, encoding=replace(stage.encoding, pictures=("latent", "teacher")))


REFUSED = {
    "language model": (
        {},
        lambda s: disturb(s, "language_model"),
        r"weights of language_model: found \w{12}\.\.\., expected",
    ),
    "tokenizer": (
        {},
        lambda s: disturb(s, "tokenizer.fusion"),
        r"\(weights of tokenizer: found \w+\.\.\., expected \w+\.\.\.\);",
    ),
    "latent scale": ({}, with_constant, r"latent_scale: found [\d.]+, expected 7.5"),
    "prompt length": (
        {},
        lambda s: replace(s, sample=replace(s.sample, num_tokens=9)),
        "num_tokens: found 14, expected 9",
    ),
    "image size": (
        {},
        lambda s: replace(s, sample=replace(s.sample, image_size=64)),
        "image_size: found 32, expected 64",
    ),
    "precision": ({"precision": "bf16"}, lambda s: s, "precision: found fp32, expected bf16"),
    "slot": ({}, with_slot, "slot teacher: found nothing, expected of the pictures"),
    "elsewhere": ({"data__encoded": "../nowhere"}, lambda s: s, r"there is no \S+nowhere/manifest.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_was_made_of_other_things_is_refused_with_the_command(folder, stored, case):
    changes, change, message = REFUSED[case]
    recipe = recipe_of(folder)
    stage = change(build(recipe))
    with pytest.raises(UserError, match=message) as refusal:
        open_encoded(recipe_of(folder, **changes), stage)
    assert "data.encoded: " in str(refusal.value) and "run `spar-scale data encode" in str(refusal.value)


def test_what_is_not_used_may_differ(folder, stored):
    stage = disturb(disturb(build(recipe_of(folder)), "tokenizer.decoder"), "queries")
    assert open_encoded(recipe_of(folder), stage) is not None
    assert open_encoded(recipe_of(folder, data__encoded=None), stage) is None


OTHERS = {
    "shards": lambda entry: {"shards": entry["shards"].replace("*", "00001")},
    "fit": lambda _: {"fit": "stretch"},
    "text": lambda _: {"text": "txt"},
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("source", ["generation", "editing"])
def test_a_source_that_is_read_otherwise_is_refused(folder, stored, source, other):
    values = values_of(folder, "align/joint", "refused", data__encoded=str(stored / "align/joint"))
    for entry in values["data"]["sources"]:
        if entry["name"] == source:
            entry |= OTHERS[other](entry)
    recipe = Recipe.model_validate_json(json.dumps(values))
    with pytest.raises(
        UserError, match=f"manifest.json was made from other shards of source '{source}' or .* fit; run"
    ):
        open_encoded(recipe, build(recipe))


def test_what_a_recipe_augments_is_refused(folder):
    stage = build(recipe_of(folder))
    with pytest.raises(UserError, match="of source 'generation' is drawn again in every epoch"):
        open_encoded(recipe_of(folder), replace(stage, sample=replace(stage.sample, task="images")))


def test_a_phase_that_reads_nothing_of_it_is_refused(folder, tmp_path, capsys):
    values = values_of(folder, "tokenizer/init", "refused", data__encoded="../stored")
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    assert main(["data", "encode", str(tmp_path / "recipe.yaml")]) == 2
    assert 'data.encoded: found "../stored", but stage tokenizer does not read it' in capsys.readouterr().err


def test_a_recipe_that_names_no_directory_is_refused(folder):
    with pytest.raises(UserError, match=r"data\.encoded: not set; give the directory"):
        encode(recipe_of(folder, data__encoded=None))


def test_a_half_written_directory_is_not_read_and_is_finished_by_the_same_command(folder, stored, tmp_path):
    whole = folder / "stored" / "align" / "joint"
    shutil.copytree(whole, tmp_path / "half")
    recipe = recipe_of(folder, data__encoded=str(tmp_path / "half"))
    stage = build(recipe)
    kept = tmp_path / "half" / "editing-00001.safetensors"
    before = kept.stat().st_mtime_ns
    (tmp_path / "half" / "editing-00000.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match=r"editing-00000\.safetensors cannot be read"):
        open_encoded(recipe, stage)
    (tmp_path / "half" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"there is no .*manifest\.json; run `spar-scale data encode"):
        open_encoded(recipe, stage)
    encode(recipe)
    assert open_encoded(recipe, stage) is not None and kept.stat().st_mtime_ns == before
    for path in whole.glob("*.safetensors"):
        one, other = load_file(path), load_file(tmp_path / "half" / path.name)
        assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_files_of_other_weights_are_not_kept(folder, stored, tmp_path):
    shutil.copytree(folder / "stored" / "align" / "joint", tmp_path / "old")
    recipe = recipe_of(folder, data__encoded=str(tmp_path / "old"))
    manifest = json.loads((tmp_path / "old" / "manifest.json").read_text())
    manifest["made_of"]["weights of tokenizer"] = "0" * 64
    (tmp_path / "old" / "manifest.json").write_text(json.dumps(manifest))
    manifest["made_of"] = made_of_stage(recipe, build(recipe))
    with pytest.raises(UserError, match="weights of tokenizer: found 000000000000"):
        open_encoded(recipe, build(recipe))
    (tmp_path / "old" / "generation-00000.safetensors").unlink()
    encode(recipe)
    assert json.loads((tmp_path / "old" / "manifest.json").read_text()) == manifest
