"""A new language-model family is one folder and a preset: every command takes it, and no other file changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import run_world
from report_root import Page
from tiny_parts import make_parts
from tiny_runs import make_data, metrics, phase_values, train_all
from toy_language import TOY, ToyLanguage, write_language_model

from parallel.errors import UserError
from spar_scale.cli import main
from spar_scale.cluster.submit import submit
from spar_scale.config.recipe import Recipe
from spar_scale.models.presets import Preset
from spar_scale.planning.plan import plan
from spar_scale.runs.curves import LOSS_RELATIVE, NORM_RELATIVE, curve, distance
from spar_scale.stages import build, meta_stage
from spar_scale.stages.forward import Forward
from spar_scale.training.admission import refusals

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = {"one": (1, 1, 1, 1), "zero-3": (2, 3, 1, 1), "pipeline": (2, 1, 2, 1), "tensor": (2, 1, 1, 2)}
"""Name -> processes, ZeRO stage, pipeline-parallel and tensor-parallel size."""


def values(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    _, zero, pipeline, tensor = LAYOUTS[name]
    parallel = {"zero": zero, "pipeline": pipeline, "tensor": tensor, "micro_batch": 2}
    parts = {part: str(folder / "parts" / part) for part in ("mllm", "pixel_autoencoder", "diffusion")}
    changes |= {"train": {"steps": 6}, "checkpoint": {"every": 6}, "global_batch": 6, "data__task_block": 3}
    return phase_values(
        folder / name, "align/connector", folder / "data", parts, "toy", parallel=parallel, seed=1, **changes
    )


def recipe_of(folder: Path, name: str = "one") -> Recipe:
    return Recipe.model_validate_json(json.dumps(values(folder, name)))


def train_toy(rank: int, world: int, recipes: list[dict[str, Any]]) -> int:
    """Train in a worker, which knows the preset because this module imports it."""
    return train_all(rank, world, recipes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from nano import NANO

    folder = tmp_path_factory.mktemp("toy")
    make_data(folder / "data")
    make_parts(folder / "parts", NANO)
    shutil.rmtree(folder / "parts" / "mllm")
    write_language_model(folder / "parts" / "mllm")
    for name, layout in LAYOUTS.items():
        run_world(layout[0], train_toy, [values(folder, name)], initialise=False)
    return folder


@pytest.mark.parametrize("name", list(LAYOUTS)[1:])
def test_it_trains_one_curve_under_every_layout(runs: Path, name: str):
    assert len(metrics(runs / "one")) == 6
    loss, norm = distance(curve(runs / name), curve(runs / "one"))
    assert loss <= LOSS_RELATIVE and norm <= NORM_RELATIVE


def test_its_words_and_its_layers_are_what_trains_the_queries(runs: Path):
    """Its weights stay frozen, and other words of it give other captions for the same prompt."""
    stage = build(recipe_of(runs))
    language: Any = stage.model.get_submodule("language_model")
    assert not any(parameter.requires_grad for parameter in language.parameters())
    forward = Forward(stage, TOY)
    prompt = [forward.text.generation_prompt("a red circle")]
    before = forward.condition(prompt)[0]
    with torch.no_grad():
        language.words.weight[forward.text.vocabulary["blue"]] += 1.0  # of a word that the prompt does not have
        assert torch.equal(forward.condition(prompt)[0], before)
        language.words.weight[forward.text.vocabulary["red"]] += 1.0
    assert (forward.condition(prompt)[0] - before).abs().amax(-1).min() > 0, "every token and query heard of the word"
    assert {type(layer).__name__ for layer in stage.layers} >= {"PromptBlock", "QueryBlock", "BothWays"}


def test_it_is_checked_and_planned(runs: Path):
    recipe = recipe_of(runs)
    assert refusals(recipe.model_copy(update={"run_dir": runs / "new"}), 2, meta_stage(recipe)) == []
    found = plan(recipe, 8, "h200")
    assert any(estimate.refused is None and estimate.layout.tensor == 2 for estimate in found.estimates)
    text = found.text()
    assert "align/connector, preset toy" in text and "language" in text


def test_it_draws_and_the_report_has_its_row(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", str(runs / "one"), "a red circle", "-o", str(tmp_path / "out.png")]) == 0
    assert "preset 'toy'" in capsys.readouterr().out and (tmp_path / "out.png").is_file()
    root = tmp_path / "root"
    shutil.copytree(runs / "one", root / "align_connector")
    assert Page(root).row("align connector")[:3] == ["align connector", "2", "6"]


def test_slurm_gets_its_recipe(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SIZE", raising=False)
    lines = submit(ROOT / "recipes" / "smoke", tmp_path / "runs", ["model.preset=toy"], dry_run=True).splitlines()
    assert any(line.startswith("align_connector=") and "model.preset=toy" in line for line in lines)


def test_a_phase_that_needs_a_role_which_is_absent_is_refused(runs: Path):
    parts = {part: str(runs / "parts" / part) for part in ("mllm", "tokenizer", "diffusion")}
    joint = phase_values(runs / "joint", "align/joint", runs / "data", parts, "toy")
    with pytest.raises(UserError, match=r"model\.preset: 'toy' has no tokenizer, which this phase or command needs"):
        build(Recipe.model_validate_json(json.dumps(joint)))


def test_sizes_that_do_not_fit_a_role_s_neighbours_are_refused():
    with pytest.raises(ValueError, match=r"'odd': conditioning.sampled_states = 2 must be at most language.layers = 1"):
        Preset(
            name="odd", image_size=32, language=ToyLanguage(16, 1, 72), conditioning=TOY.conditioning,
            autoencoder=TOY.autoencoder, diffusion=TOY.diffusion,
        )  # fmt: skip
