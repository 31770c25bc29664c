"""The declarations of the phases: a new phase is one module and its recipes, and the lists elsewhere derive from it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import run_world
from PIL import Image
from report_root import Page
from tiny_runs import make_data, metrics, phase_values, train_all

from parallel import checkpoint
from parallel.errors import UserError
from spar_scale import phases
from spar_scale.cli import main
from spar_scale.cli.arguments import build_parser
from spar_scale.cluster.submit import submit
from spar_scale.config.recipe import Recipe, flatten, load_recipe
from spar_scale.inference.runs import LACKS, fit_recipe
from spar_scale.planning.plan import count
from spar_scale.runs import chain
from spar_scale.runs.curves import LOSS_RELATIVE, NORM_RELATIVE, curve, distance
from spar_scale.stages import build
from spar_scale.training.optimizers import parameter_groups

ROOT = Path(__file__).resolve().parents[2]
NEW = "sharpen_autoencoder"
MODULE = '''
"""A new training stage with one phase: the pixel autoencoder goes on with other weights of its losses."""

from spar_scale.phases import Phase, bootstrap_autoencoder

PHASE = Phase(
    name="sharpen_autoencoder",
    training_stage="sharpen",
    stage_number=4,
    phase="autoencoder",
    trains="the autoencoder once more",
    losses="twice the squared error",
    reads=("objective.latent_noise", "objective.latent_power_weight"),
    starts_from=("bootstrap_autoencoder",),
    publishes="sharp_autoencoder",
    used_by=frozenset({"reconstruct"}),
    evaluated_as="reconstruction",
    slurm_script="stage0_bootstrap.sh",
    samples_per_s=64,
)


def build(recipe):
    stage = bootstrap_autoencoder.build(recipe)
    stage.terms = {"mean_squared_error": 2.0, "latent_power": recipe.objective.latent_power_weight}
    stage.companions.append(Counter())
    return stage


class Counter:
    """A companion that counts its steps, and adds up its learning rates."""

    name = "counter"

    def bind(self, topology, device, betas):
        import torch

        self.kept = torch.zeros(2, device=device)

    def begin_step(self, step):
        assert step == self.kept[0] + 1

    def end_step(self, lr, clip):
        self.kept[0] += 1
        self.kept[1] += lr

    def tensors(self):
        return {"counter.kept": self.kept}
'''
RECIPE = """
extends: bootstrap_autoencoder.yaml
stage: sharpen
run_dir: runs/smoke/sharpen_autoencoder
init_from: ../bootstrap_autoencoder
objective: {perceptual_weight: 0.0}
"""


def train_new(rank: int, world: int, folder: str, recipes: list[dict[str, Any]]) -> int:
    phases.__path__ = [*phases.__path__, folder]
    return train_all(rank, world, recipes)


def values(runs: Path, world: int) -> dict[str, Any]:
    """A recipe of the new phase for a number of processes."""
    name = NEW if world == 1 else f"{NEW}-{world}"
    changes: dict[str, Any] = {"train": {"steps": 2}, "checkpoint": {"every": 2}, "objective": {"latent_noise": 0.1}}
    changes |= {"optimizer__groups": {"counter": 0.5}}
    return phase_values(runs / name, "sharpen/autoencoder", runs / "data", {}, "nano", **changes)


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the module of a new phase."""
    folder = tmp_path_factory.mktemp("phases")
    (folder / f"{NEW}.py").write_text(MODULE)
    return folder


@pytest.fixture
def new_phase(module: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The new phase, known during a test."""
    monkeypatch.setattr(phases, "__path__", [*phases.__path__, str(module)])
    yield
    sys.modules.pop(f"spar_scale.phases.{NEW}", None)


@pytest.fixture(scope="module")
def trained(module: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of the new phase with one and with two processes."""
    folder = tmp_path_factory.mktemp("runs")
    make_data(folder / "data")
    for world in (1, 2):
        run_world(world, train_new, str(module), [values(folder, world)], initialise=False)
    return folder


@pytest.fixture
def runs(trained: Path, new_phase: None) -> Path:
    return trained


@pytest.fixture
def recipes(new_phase: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the recipes with one of the new phase in the size `smoke`."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    (tmp_path / "recipes" / "smoke" / f"{NEW}.yaml").write_text(RECIPE)
    monkeypatch.setattr(chain, "RECIPES", tmp_path / "recipes")
    return tmp_path / "recipes"


# -- a new phase is one module and its recipes --------------------------------------------------------


def test_its_recipe_is_validated_by_its_declaration(recipes: Path):
    path = recipes / "smoke" / f"{NEW}.yaml"
    assert phases.phase_of(load_recipe(path)).name == NEW
    with pytest.raises(UserError, match=r"perceptual_weight: .* stage sharpen does not read it \(only bootstrap/auto"):
        load_recipe(path, ["objective.perceptual_weight=0.5"])
    with pytest.raises(UserError, match=r'stage: found "sharpn", must be .*\'sharpen\'; did you mean \'sharpen\'\?'):
        load_recipe(path, ["stage=sharpn"])
    with pytest.raises(UserError, match="stage sharpen has autoencoder; did you mean 'autoencoder'"):
        load_recipe(path, ["phase=autoencodr"])


def test_it_is_built_and_planned(new_phase: None, tmp_path: Path):
    recipe = Recipe.model_validate_json(json.dumps(values(tmp_path, 1)))
    assert build(recipe).terms == {"mean_squared_error": 2.0, "latent_power": 0.0}
    assert sum(cost.flops for cost in count(recipe, 1).costs) > 0


def test_it_takes_no_part_that_it_does_not_declare(new_phase: None, tmp_path: Path):
    recipe = Recipe.model_validate_json(json.dumps(values(tmp_path, 1)))
    model = recipe.model.model_copy(update={"pretrained": {"mllm": "somewhere"}})
    with pytest.raises(UserError, match=r"model\.pretrained\.mllm: stage 'sharpen', phase 'autoencoder' takes none"):
        build(recipe.model_copy(update={"model": model}))


def test_the_chain_trains_it_after_the_phase_that_it_starts_from(recipes: Path, tmp_path: Path):
    found = {step.name: step for step in chain.Chain(tmp_path, "smoke", 0).steps()}
    assert found[NEW].after == ("data", "bootstrap_autoencoder")
    assert found[NEW].seconds == chain.START_S + 6 * 16 / 64
    assert NEW not in {step.name for step in chain.Chain(tmp_path, "demo", 0).steps()}  # no recipe in that size


def test_slurm_gets_its_script(recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SIZE", raising=False)
    lines = submit(recipes / "smoke", tmp_path / "runs", [], dry_run=True).splitlines()
    (line,) = [line for line in lines if line.startswith(f"{NEW}=")]
    assert "afterok:${world}:${bootstrap_autoencoder} " in line and " cluster/stage0_bootstrap.sh " in line


def test_it_trains_one_curve_with_one_process_and_with_two(runs: Path):
    assert len(metrics(runs / NEW)) == 2
    loss, norm = distance(curve(runs / f"{NEW}-2"), curve(runs / NEW))
    assert loss <= LOSS_RELATIVE and norm <= NORM_RELATIVE
    assert (runs / NEW / "pretrained" / "config.json").is_file()


@pytest.mark.parametrize("name", [NEW, f"{NEW}-2"])
def test_the_trainer_steps_and_saves_its_companion(runs: Path, name: str):
    kept = checkpoint.read(runs / name / "checkpoints" / "step-00000002", None)["counter.kept"]
    rates = [line["lr"] for line in metrics(runs / name)]
    assert kept.tolist() == pytest.approx([2, 0.5 * sum(rates)]) and min(rates) > 0


def test_a_group_of_neither_the_phase_nor_a_companion_is_refused(new_phase: None, tmp_path: Path):
    recipe = Recipe.model_validate_json(json.dumps(values(tmp_path, 1)))
    settings = recipe.optimizer.model_copy(update={"groups": {"countr": 0.5}})
    with pytest.raises(UserError, match=r"optimizer\.groups\.countr: .*\['counter', 'main'\].*did you mean 'counter'"):
        parameter_groups(build(recipe), settings)


def test_the_commands_that_it_names_use_its_run_and_the_others_refuse_it(runs: Path, tmp_path: Path, capsys):
    Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(tmp_path / "in.png")
    assert main(["reconstruct", str(runs / NEW), str(tmp_path / "in.png"), "-o", str(tmp_path / "out.png")]) == 0
    assert f"the average of {runs / NEW}" in capsys.readouterr().out
    for command in set(LACKS) - {"reconstruct"}:
        with pytest.raises(UserError, match=f"phase 'autoencoder', which {LACKS[command]}"):
            fit_recipe(runs / NEW, command)


def test_the_help_names_it(new_phase: None, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["reconstruct", "--help"])
    assert NEW in capsys.readouterr().out


def test_the_report_has_its_row(runs: Path):
    row = Page(runs).row("sharpen autoencoder")
    assert row[:3] == ["sharpen autoencoder", "4", "2"] and row[-1] == "the autoencoder once more"


def test_the_evaluation_reconstructs_with_it(new_phase: None):
    assert [phase.name for phase in phases.with_role("reconstruction")][-1] == NEW


# -- the declarations ----------------------------------------------------------------------------------


def test_every_phase_comes_after_those_that_it_needs():
    order, published = [], set()
    for phase in phases.declared():
        assert set(phase.starts_from) <= set(order), phase.name
        assert {*phase.requires, *phase.accepts} <= published, phase.name
        order.append(phase.name)
        published |= {phase.publishes}
    assert order[0] == "bootstrap_autoencoder" and order[-1] == "instruct"


def test_all_keys_that_phases_read_are_keys_of_the_schema_and_every_switch_and_weight_is_read():
    recipe = load_recipe(ROOT / "recipes" / "tiny" / "align_joint.yaml")
    schema = {key for key, _ in flatten(recipe.model_dump())}
    for phase in phases.declared():
        assert phase.optional_keys <= schema, phase.name
        assert {key for key, *_ in phase.requires_when.values()} <= phase.optional_keys, phase.name
    switches = {key for key in schema if key.startswith(("model.", "objective."))}
    general = {key for key in switches if key == "model.preset" or key.startswith("model.pretrained")}
    assert switches - general <= set(phases.readers())


def test_declared_are_the_parts_that_the_recipes_name():
    for path in sorted((ROOT / "recipes").glob("*/*.yaml")):
        if path.stem in phases.phase_names():
            recipe, phase = load_recipe(path), phases.named(path.stem)
            assert phases.phase_of(recipe) == phase
            allowed, required = phase.pretrained_parts(recipe)
            assert set(required) <= set(recipe.model.pretrained) <= set(allowed), path
            assert (recipe.init_from is not None) == bool(phase.starts_from), path


def test_declared_scripts_exist():
    for phase in phases.declared():
        assert (ROOT / "cluster" / phase.slurm_script).is_file(), phase.name


def test_an_external_teacher_is_required_where_the_alignment_is_external_alone():
    recipe, joint = load_recipe(ROOT / "recipes" / "tiny" / "align_joint.yaml"), phases.named("align_joint")
    external = recipe.model_copy(update={"model": recipe.model.model_copy(update={"alignment": "external"})})
    assert "teacher" not in joint.pretrained_parts(recipe)[0]
    assert "teacher" in joint.pretrained_parts(external)[1]


def test_the_table_in_the_readme_is_that_of_the_declarations():
    begin, end = "<!-- phases: this table is written by spar_scale.phases.table() -->\n", "\n<!-- end of phases -->"
    written = (ROOT / "README.md").read_text(encoding="utf-8").partition(begin)[2].partition(end)[0]
    assert written == phases.table()


def test_a_recipe_is_checked_without_a_model_library():
    heavy = ("torch", "numpy", "diffusers", "transformers", "deepspeed")
    program = (
        "import sys; from spar_scale import phases; from spar_scale.config import recipe\n"
        "recipe.load_recipe('recipes/tiny/instruct.yaml')\n"
        f"print(*phases.phase_names(), *(name for name in {heavy!r} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == list(phases.phase_names())


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"phase: 'align_jont' is not one of .*; did you mean 'align_joint'\?"):
        phases.named("align_jont")


WRONG = {
    "no declaration": ("", r"found PHASE = None, expected PHASE = Phase\(name='wrong'"),
    "another name": (MODULE, r"expected PHASE = Phase\(name='wrong'"),
    "taken": (
        MODULE.replace(f'"{NEW}"', '"wrong"').replace('"sharpen"', '"instruct"').replace('"autoencoder"', '"joint"'),
        "instruct/joint is already declared by instruct",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_module_that_declares_no_phase_of_its_own_is_refused(case: str, tmp_path: Path, monkeypatch):
    text, message = WRONG[case]
    (tmp_path / "wrong.py").write_text(text)
    monkeypatch.setattr(phases, "__path__", [*phases.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "spar_scale.phases.wrong", raising=False)
    with pytest.raises((TypeError, ValueError), match=message):
        phases.declared()
    sys.modules.pop("spar_scale.phases.wrong", None)
