"""Losses on samples apart: the same each time, paired over runs, with a control that hears another's prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import run_world
from packed import samples
from tiny_parts import make_parts
from tiny_runs import make_data, phase_values, train_all
from torch import Tensor

from parallel import checkpoint
from parallel.errors import UserError
from parallel.program import Program
from spar_scale.config.recipe import Recipe
from spar_scale.data.loader import Loader, Source
from spar_scale.evaluation.held_out import difference, held_out_terms, stage_terms
from spar_scale.stages import build
from spar_scale.training.export import recipe_of
from spar_scale.training.parent import overwrite, started_stage

SAMPLES = 10
TERMS = {"flow_matching", "alignment"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Runs of three steps that always drop the caption or never do, and shards of 24 scenes and 12 edits."""
    folder = tmp_path_factory.mktemp("held_out")
    make_data(folder / "data", scenes=24, edits=12)
    parts = make_parts(folder / "parts")
    few: dict[str, Any] = {"train": {"steps": 3, "log_every": 3}, "checkpoint": {"every": 3, "keep": 1}}
    recipes = [
        phase_values(folder / name, "align/joint", folder / "data", parts, objective__caption_dropout=rate, **few)
        for name, rate in (("run", 0.0), ("dropping", 1.0))
    ]
    run_world(1, train_all, recipes, initialise=False)
    return folder


def shards_of(folder: Path, *names: str) -> dict[str, str]:
    files = {"generation": "scenes-*.tar", "editing": "edits-*.tar"}
    return {name: str(folder / "data" / files[name]) for name in names}


@pytest.fixture(scope="module")
def right(folder) -> dict[str, Tensor]:
    return held_out_terms(folder / "run", shards_of(folder, "generation"), SAMPLES)


def test_each_sample_has_a_value_of_each_term_and_the_same_again(folder, right):
    assert right.keys() == TERMS and all(value.shape == (SAMPLES,) for value in right.values())
    again = held_out_terms(folder / "run", shards_of(folder, "generation"), SAMPLES)
    assert all(torch.equal(value, again[name]) for name, value in right.items())
    assert len(set(right["flow_matching"].tolist())) == SAMPLES


def test_the_values_are_those_of_the_averaged_weights_on_the_runs_list_of_layers(folder, right):
    stage = build(recipe_of(folder / "run"))
    found = checkpoint.find(folder / "run" / "checkpoints")
    assert found is not None
    start = Program(stage.layers, stage.inputs, list(stage.terms)).eval()
    (batch,) = Loader([Source("generation", shards_of(folder, "generation")["generation"])], stage.sample, 0, 5, 5, 5,
                      0, 1, 0, 0, 1)  # fmt: skip
    untrained = start(batch)[:, 0]
    overwrite(stage.model, checkpoint.read(found, "ema"), found)
    torch.testing.assert_close(right["flow_matching"][:5], start(batch)[:, 0], rtol=1e-5, atol=0)
    assert not torch.equal(untrained, start(batch)[:, 0])


def test_a_neighbours_prompt_changes_the_loss_and_neither_noise_nor_picture(folder, right, monkeypatch):
    seen: list[dict[str, Tensor]] = []
    forward = Program.forward
    monkeypatch.setattr(Program, "forward", lambda self, slots: seen.append(dict(slots)) or forward(self, slots))
    for shuffled in (False, True):
        terms = held_out_terms(folder / "run", shards_of(folder, "generation"), SAMPLES, shuffled)
    assert (terms["flow_matching"] != right["flow_matching"]).sum() >= SAMPLES - 2  # two captions may be alike
    first, other = seen
    assert all(torch.equal(first[name], other[name]) for name in ("images", "latent_noise", "timestep_draw"))
    prompts, moved = ([one["tokens"].tolist() for one in samples(slots)] for slots in (first, other))
    assert [prompts[-1], *prompts[:-1]] == moved


def test_mirroring_turns_the_picture_to_edit_and_not_the_target(folder, monkeypatch):
    seen: list[dict[str, Tensor]] = []
    forward = Program.forward
    monkeypatch.setattr(Program, "forward", lambda self, slots: seen.append(dict(slots)) or forward(self, slots))
    edits = shards_of(folder, "editing")
    right, mirrored = (held_out_terms(folder / "run", edits, 6, mirrored=turned) for turned in (False, True))
    first, other = seen
    assert torch.equal(first["images"][:, 0], other["images"][:, 0])
    assert torch.equal(first["images"][:, 1].flip(-1), other["images"][:, 1])
    assert all(torch.equal(first[name], other[name]) for name in ("tokens", "latent_noise", "timestep_draw"))
    assert (right["flow_matching"] != mirrored["flow_matching"]).all()


def test_no_caption_is_dropped_whatever_the_run_did(folder, right):
    shards = shards_of(folder, "generation")
    shuffled = held_out_terms(folder / "dropping", shards, SAMPLES, shuffled=True)
    told = held_out_terms(folder / "dropping", shards, SAMPLES)
    assert (told["flow_matching"] != shuffled["flow_matching"]).sum() >= SAMPLES - 2
    assert not torch.equal(told["flow_matching"], right["flow_matching"])


def test_tasks_are_mixed_in_equal_shares(folder):
    stage = started_stage(recipe_of(folder / "run"))
    terms = stage_terms(stage, shards_of(folder, "generation", "editing"), 8, batch=2)
    assert all(value.shape == (8,) and value.isfinite().all() for value in terms.values())


def test_the_difference_of_pairs_by_hand():
    mean, error = difference(torch.tensor([3.0, 5.0, 7.0]), torch.tensor([2.0, 2.0, 2.0]))
    assert mean == 3 and error == pytest.approx(2 / 3**0.5)  # differences 1, 3, 5 deviate by 2


@pytest.mark.parametrize(("names", "asked", "count"), [(("editing",), 50, 12), (("generation",), 7, 7)])
def test_no_sample_counts_twice(folder, names, asked, count):
    terms = held_out_terms(folder / "run", shards_of(folder, *names), asked)
    assert all(len(value) == count == len(set(value.tolist())) for value in terms.values())


def test_what_is_no_trained_run_or_no_task_of_it_is_refused(folder, tmp_path):
    shards = shards_of(folder, "generation")
    with pytest.raises(UserError, match=r"holds no recipe\.yaml; expected a directory that `spar-scale train` wrote"):
        held_out_terms(tmp_path, shards, SAMPLES)
    (tmp_path / "recipe.yaml").write_text((folder / "run" / "recipe.yaml").read_text())
    with pytest.raises(UserError, match="holds no checkpoint yet; train it further"):
        held_out_terms(tmp_path, shards, SAMPLES)
    with pytest.raises(UserError, match=r"^data\.sources: 'generate' is not a task .*did you mean 'generation'\?"):
        held_out_terms(folder / "run", {"generate": shards["generation"]}, SAMPLES)
    with pytest.raises(UserError, match=r"nowhere-\*\.tar"):
        held_out_terms(folder / "run", {"generation": str(folder / "nowhere-*.tar")}, SAMPLES)


def test_a_phase_without_prompts_has_none_to_shuffle(tmp_path):
    stage = build(Recipe.model_validate_json(json.dumps(phase_values(
        tmp_path, "bootstrap/autoencoder", tmp_path, {}
    ))))  # fmt: skip
    with pytest.raises(UserError, match="this phase reads images: there are no prompts to shuffle"):
        stage_terms(stage, {"images": "none.tar"}, 4, shuffled=True)
