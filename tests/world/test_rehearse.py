"""A rehearsal of SPAR-1B's recipes shows each phase and use; what was not shown is a fault, and exit code 1."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from launching import run_command
from PIL import Image
from tiny_runs import metrics

from parallel.errors import UserError
from spar_scale.config.recipe import load_recipe
from spar_scale.runs.rehearsal import rehearse
from spar_scale.runs.rehearsal.photographs import COUNT, photograph
from spar_scale.runs.rehearsal.recipes import SAVED, STEPS, rehearsed_phases
from spar_scale.runs.rehearsal.table import Row

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a rehearsal that ended with exit code 0, which it does only if everything was shown."""
    out = tmp_path_factory.mktemp("rehearsal") / "out"
    run_command(["rehearse", str(RECIPES / "spar_1b"), "--preset", "nano", "--out", str(out)], out.parent)
    return out


def test_every_phase_of_the_folder_trained_and_was_resumed(shown: Path):
    phases = {path.stem for path in (RECIPES / "spar_1b").glob("*.yaml")} - {"base"}
    assert {path.stem for path in (shown / "recipes").glob("*.yaml")} == phases
    for phase in phases:
        losses = [line["loss"] for line in metrics(shown / phase)]
        assert len(losses) == STEPS and len(set(losses)) > 1 and all(map(math.isfinite, losses))
        saved = {path.name for path in (shown / phase / "checkpoints").glob("step-*")}
        assert saved == {f"step-{step:08d}" for step in (SAVED, STEPS)}
        written = load_recipe(shown / phase / "recipe.yaml")
        assert written.optimizer.lr == load_recipe(RECIPES / "spar_1b" / f"{phase}.yaml").optimizer.lr


def test_the_last_run_drew_and_edited(shown: Path):
    for name in ("generate", "edit"):
        assert Image.open(shown / f"{name}.png").size == (224, 224)


def test_a_resumed_run_that_differs_is_a_fault():
    row = Row("align_joint")
    row.compare([(2.0, 1.0), (1.5, 1.0)], [(2.0, 1.0), (1.5001, 1.0)], 1, "1 process to pp2", {"editing": 0})
    assert [fault.split(" (")[0] for fault in row.faults] == ["no sample of editing", "the resumed run differs"]
    row.compare([(2.0, 1.0), (1.5, 1.0)], [(2.0, 1.0), (1.5, 1.0)], 1, "1 process to pp2", {"editing": 1})
    assert row.faults == []
    row.compare([(2.0, 1.0), (2.0, math.nan)], [(2.0, 1.0), (2.0, math.nan)], 1, "1 process to pp2", {})
    assert len(row.faults) == 3


def test_photographs_have_fine_texture_and_differ():
    pictures = [np.asarray(photograph(number).convert("L"), dtype=float) for number in range(0, COUNT, 5)]
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)
    assert min(np.abs(np.diff(picture, axis=1)).mean() for picture in pictures) > 0.5  # of 255, between neighbours


def test_phases_are_chosen_with_what_they_start_from(tmp_path: Path):
    phases = rehearsed_phases(RECIPES / "spar_3b", tmp_path, "thin", ["align_joint"])
    assert [phase.name for phase in phases][-2:] == ["align_connector", "align_joint"]
    assert phases[-1].recipe.objective.align_block == phases[-1].preset.diffusion.layers == 2
    assert phases[-1].reduced() == ", align_block 2 (recipe: 6)" and phases[0].reduced() == ""
    assert "  objective.align_block: 6 -> 2" in phases[-1].told().splitlines()


def test_random_weights_never_go_where_the_recipe_has_published_ones(tmp_path: Path):
    values = {"extends": str(RECIPES / "spar_1b" / "align_connector.yaml")}
    values |= {"model": {"pretrained": {"mllm": str(tmp_path / "mine")}}}
    (tmp_path / "align_connector.yaml").write_text(yaml.safe_dump(values))
    (phase,) = rehearsed_phases(tmp_path, tmp_path / "out", "thin", [])
    assert phase.written_parts["mllm"] == tmp_path / "out" / "pretrained" / "mllm"
    assert phase.recipe.model.pretrained["mllm"] == "../pretrained/mllm"


@pytest.mark.parametrize(
    ("folder", "wanted", "tokenizer", "said"),
    [
        ("tiny", [], None, r"model\.preset is 'tiny'; a rehearsal is of spar_1b or spar_3b\. .*demo --size smoke"),
        (".", [], None, r"holds no recipe of a phase"),
        ("spar_1b", ["align_joined"], None, r"phase: 'align_joined' is not one of .*did you mean 'align_joint'"),
        ("spar_1b", ["bootstrap_mllm"], None, r"--phases: .*holds no bootstrap_mllm\.yaml; it has tokenizer_init,"),
        ("spar_1b", [], RECIPES, r"--tokenizer: .*recipes holds no tokenizer\.json"),
    ],
)
def test_what_cannot_be_rehearsed_is_refused(tmp_path: Path, folder: str, wanted: list[str], tokenizer, said: str):
    with pytest.raises(UserError, match=said):
        rehearse(RECIPES / folder, tmp_path / "out", "thin", wanted, tokenizer)


def test_a_directory_that_is_not_empty_is_refused(tmp_path: Path):
    (tmp_path / "mine").touch()
    with pytest.raises(UserError, match=r"--out: found .*, which is not empty"):
        rehearse(RECIPES / "spar_1b", tmp_path, "nano")
