"""The command that measures the promise: its verdict is that of the curves, its exit code that of the verdict."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from launching import preload, start_process
from nano import NANO
from tiny_parts import make_parts
from tiny_runs import make_data, metrics, phase_values

from parallel.errors import UserError
from spar_scale.runs.curves import LOSS_RELATIVE, NORM_RELATIVE, curve
from spar_scale.runs.parity import (
    PARITY_LAYOUTS,
    RESUMED,
    SERIAL,
    USUAL,
    Parity,
    ParityLayout,
    Row,
    Runs,
    parity,
    parse_layouts,
)

preload("spar_scale.runs.parity", "nano")

BOUNDS = LOSS_RELATIVE, NORM_RELATIVE


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of the joint phase whose references are relative to its run directory."""
    folder = tmp_path_factory.mktemp("parity")
    make_data(folder / "data", edits=32)
    parts = {name: f"../parts/{name}" for name in make_parts(folder / "parts", NANO)}
    values = phase_values(
        folder / "run", "align/joint", folder / "data", parts, "nano", global_batch=6, data__task_block=3
    )
    path = folder / "joint.yaml"
    path.write_text(yaml.safe_dump(values | {"optimizer": values["optimizer"] | {"name": "muon", "clip": 0}}))
    return path


def say(folder: str, seed: int | None, words: list[str]) -> None:
    """`spar-scale` with these words, into files; with `seed` every layout of data ranks trains another run."""
    from spar_scale import cli

    whole = Parity.recipe

    def other(self: Parity, layout: ParityLayout, name: str):
        return whole(self, layout, name).model_copy(update={"seed": seed} if layout.data > 1 else {})

    if seed is not None:
        Parity.recipe = other
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT), number)
    code = cli.main(words)
    sys.stdout.flush()
    (Path(folder) / "code").write_text(str(code))


def parity_command(folder: Path, *words: object, seed: int | None = None) -> tuple[int, str]:
    """Exit code and stdout of `spar-scale parity` in a process of its own, which it forks its worlds from."""
    process = start_process(say, str(folder), seed, ["parity", *map(str, words)])
    process.join()
    assert process.exitcode == 0, (folder / "stderr").read_text()
    return int((folder / "code").read_text()), (folder / "stdout").read_text()


def rows(text: str) -> dict[str, list[str]]:
    """Layout -> the other cells of its row."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {name: values for name, *values in cells[2:]}


def test_two_layouts_are_within_and_leave_nothing(recipe: Path, tmp_path: Path) -> None:
    code, said = parity_command(tmp_path, "--recipe", recipe, "--steps", 3, "--layouts", "dp2-z3,pp2")
    assert code == 0
    assert "in fp32 with adamw (the recipe's is muon)" in said
    found = rows(said)
    assert list(found) == ["dp1-z1", "dp2-z3", "pp2"]
    assert {values[-1] for values in found.values()} == {"within"}
    assert 0 < float(found["dp2-z3"][2]) <= NORM_RELATIVE
    assert not list(recipe.parent.glob("run-parity-*"))


def test_a_layout_that_trains_another_run_is_told_and_its_runs_stay(recipe: Path, tmp_path: Path) -> None:
    code, said = parity_command(tmp_path, "--recipe", recipe, "--steps", 2, "--layouts", "dp2-z1", seed=7)
    assert code == 1
    assert [(name, values[-1]) for name, values in rows(said).items()] == [
        ("dp1-z1", "within"),
        ("dp2-z1", "NOT within"),
    ]
    (kept,) = recipe.parent.glob("run-parity-*")
    assert said.splitlines()[-1] == f"the runs are in {kept}"
    assert not Row("", 1, 0.0, curve(kept / "dp2-z1"), curve(kept / "dp1-z1")).within(BOUNDS)
    shutil.rmtree(kept)


def test_a_pair_goes_on_from_the_middle(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, said = parity_command(
        tmp_path, "--recipe", recipe, "--steps", 2, "--layouts", "dp2-z2", "--resumed", "--out", out
    )
    assert code == 0
    assert [values[-1] for values in rows(said).values()] == ["within"]
    saved, resumed = metrics(out / "dp2-z2"), metrics(out / "dp2-z2_to_dp2-z2")
    assert saved[:2] == resumed[:2]  # also in the time that they were written
    assert [line["step"] for line in resumed] == [1, 2, 3, 4] and saved[3]["time"] < resumed[3]["time"]


def test_what_training_refuses_is_told_with_the_layout_and_leaves_nothing(recipe: Path, tmp_path: Path) -> None:
    code, said = parity_command(tmp_path, "--recipe", recipe, "--layouts", "dp2-z1", "init_from=../nowhere")
    assert code == 2 and not rows(said)
    refusal = (tmp_path / "stderr").read_text().splitlines()[-1]
    assert refusal.startswith("error: dp1-z1: init_from: ") and "holds no checkpoint; train that phase first" in refusal
    assert not list(recipe.parent.glob("run-parity-*"))


def test_names_are_read_back_and_no_two_layouts_share_one() -> None:
    assert set(PARITY_LAYOUTS) >= {"dp2-z1", "dp4-z3", "tp2", "pp2", "tp2-pp2", "tp2-dp2-z3", "tp2-pp2-dp2", *RESUMED}
    assert len(set(PARITY_LAYOUTS.values())) == len(PARITY_LAYOUTS)
    assert all(spread.name == name and spread.processes <= 8 for name, spread in PARITY_LAYOUTS.items())
    assert PARITY_LAYOUTS["tp2-dp2-z3"] == ParityLayout(tensor=2, data=2, zero=3)
    assert {PARITY_LAYOUTS[name].processes for name in USUAL} == {1, 2, 4}
    assert parse_layouts("tp2,dp1-z1,tp2", USUAL) == [PARITY_LAYOUTS["tp2"], SERIAL]


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("tp2xpp2", "'tp2-pp2'"),
        ("dp2", "'dp2-z"),
        ("pp2-dp2-z2", "without a pipeline"),
        ("tp9", "'tp"),
        ("dp2-z1,", ""),
    ],
)
def test_another_spelling_is_refused_with_the_nearest(given: str, hint: str) -> None:
    name = given.split(",")[-1]
    with pytest.raises(UserError, match=rf"^--layouts: found '{name}', expected names like tp2") as refusal:
        parse_layouts(given, USUAL)
    assert hint in str(refusal.value)


def test_what_the_recipe_cannot_have_is_refused_by_name_and_left_out_of_all(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"parallel\.tensor: found 4; preset 'nano' has language\.key_value_heads 2"):
        parity(recipe, [], "tp4", Runs())
    with pytest.raises(UserError, match=r"parallel\.tensor: found 2 with optimizer\.name muon"):
        parity(recipe, [], "tp2", Runs(optimizer="muon"))
    assert not list(recipe.parent.glob("run-parity-*"))
    allowed = Parity(recipe, [], tmp_path, Runs()).allowed([PARITY_LAYOUTS["tp4"], PARITY_LAYOUTS["tp2"]])
    assert allowed == [PARITY_LAYOUTS["tp2"]]
    assert capsys.readouterr().out.startswith("without tp4: parallel.tensor: found 4")


def test_a_directory_that_holds_something_is_refused(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    with pytest.raises(UserError, match=r"^--out: found .*, which is not empty; expected a new or empty"):
        parity(recipe, [], "all", Runs(), out=tmp_path)


def test_a_recipe_is_made_for_its_layout(recipe: Path, tmp_path: Path) -> None:
    one = Parity(recipe, [], tmp_path / "deep" / "er", Runs()).recipe(PARITY_LAYOUTS["tp2-dp2-z3"], "x")
    assert (one.parallel.tensor, one.parallel.zero, one.parallel.micro_batch) == (2, 3, 2)
    assert (one.run_dir / one.model.pretrained["mllm"]).resolve() == (recipe.parent / "parts" / "mllm").resolve()
    muon = Parity(recipe, [], tmp_path, Runs(optimizer="muon")).recipe(PARITY_LAYOUTS["dp2-z2"], "x")
    assert (muon.optimizer.name, muon.optimizer.clip, muon.precision) == ("muon", 0, "fp32")
