"""The chain of phases: who starts from whom, which switch reaches which run directory; the verdicts of ablations."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallel.errors import UserError
from spar_scale.phases import phase_names
from spar_scale.runs import demo
from spar_scale.runs.ablation import CURVE, ROWS, ablate, curve, is_significant, table, verdict
from spar_scale.runs.chain import RECIPES, Chain

PHASES = [phase for phase in phase_names() if (RECIPES / "tiny" / f"{phase}.yaml").exists()]


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path / "seed-3", "smoke", 3, shared=tmp_path)


@pytest.mark.parametrize("size", ["demo", "smoke"])
def test_every_phase_comes_after_those_that_it_starts_from(tmp_path: Path, size: str):
    chain = Chain(tmp_path, size, 0)
    for position, phase in enumerate(PHASES):
        recipe = chain.recipe(phase)
        for parent in chain.parents(phase):
            assert PHASES.index(parent) < position
        assert recipe.seed == 0 and recipe.run_dir == tmp_path / phase


def test_the_last_phases_read_what_is_stored_before_them_and_what_is_compared_is_counted_apart(tmp_path: Path):
    chain = Chain(tmp_path, "smoke", 3)
    steps = {step.name: step for step in chain.steps()}
    assert list(steps) == [*PHASES[:-2], "encoded", "tokenizer_encoder,encoder=frozen", *PHASES[-2:]]
    for name, step in steps.items():
        assert all(parent == "data" or list(steps).index(parent) < list(steps).index(name) for parent in step.after)
        recipe = step.work.args[0]
        assert recipe.data.encoded == ("../encoded" if name in ("encoded", "align_joint", "instruct") else None)
    assert set(steps["encoded"].after) == {"data", "bootstrap_mllm", "bootstrap_diffusion", "tokenizer_encoder"}
    assert steps["align_joint"].after[-1] == "encoded"
    for name in ("encoded", "instruct", "tokenizer_encoder,encoder=frozen"):
        (chain.out / name).mkdir(parents=True)
        (chain.out / name / "spent.json").write_text('{"core_seconds": 2.5, "wall_seconds": 2, "finished": true}')
    costs = demo._core_seconds(list(steps.values()))
    assert costs["core_seconds.tokenizer_encoder,encoder=frozen"] == 2.5
    assert costs["core_seconds.total"] == 5.0  # of the two others


SWITCHED = {
    ("tokenizer_init", "model.streams", "pixel"): "tokenizer_init,streams=pixel",
    ("tokenizer_encoder", "model.streams", "pixel"): "tokenizer_encoder,streams=pixel",
    ("tokenizer_decoder", "model.encoder", "frozen"): "tokenizer_decoder",
    ("tokenizer_encoder", "model.encoder", "frozen"): "tokenizer_encoder,encoder=frozen",
    ("align_joint", "model.encoder", "frozen"): "align_joint,encoder=frozen",
    ("align_connector", "model.alignment", "none"): "align_connector",
    ("align_joint", "model.alignment", "none"): "align_joint,alignment=none",
    ("bootstrap_autoencoder", "objective.perceptual_weight", 0.0): "bootstrap_autoencoder",
    ("tokenizer_init", "objective.perceptual_weight", 0.0): "tokenizer_init,perceptual_weight=0.0",
}


@pytest.mark.parametrize(("phase", "key", "value"), SWITCHED)
def test_a_run_is_named_after_the_switches_that_reach_it(chain: Chain, phase: str, key: str, value: object):
    assert chain.run_dir(phase, {key: value}).name == SWITCHED[phase, key, value]


def test_a_switched_phase_starts_from_switched_parents_and_shares_stage_0(chain: Chain, tmp_path: Path):
    switches = {"model.streams": "pixel", "model.semantic_distillation": False}
    recipe = chain.recipe("align_joint", switches)
    marks = "semantic_distillation=False,streams=pixel"
    assert recipe.run_dir == tmp_path / "seed-3" / f"align_joint,{marks}"
    assert recipe.init_from == "../align_connector"
    assert recipe.model.pretrained["tokenizer"] == f"../tokenizer_encoder,{marks}/pretrained"
    assert recipe.model.pretrained["diffusion"] == "../../bootstrap_diffusion/pretrained"
    assert recipe.seed == 3 and chain.recipe("bootstrap_mllm").seed == 0
    tokenizer = chain.recipe("tokenizer_encoder", switches)
    assert tokenizer.model.streams == "pixel" and tokenizer.model.semantic_distillation is False
    assert recipe.data.sources[1].shards == str(tmp_path / "data" / "edits-*.tar")


def test_a_pretrained_part_can_be_switched(chain: Chain, tmp_path: Path):
    recipe = chain.recipe("align_joint", ROWS["L_align to an external teacher"].switches)
    assert recipe.run_dir.name == "align_joint,alignment=external,teacher=bootstrap_mllm+pretrained"
    assert recipe.model.pretrained["teacher"] == "../../bootstrap_mllm/pretrained"
    assert "teacher" not in chain.recipe("align_connector", {"model.alignment": "external"}).model.pretrained


def test_every_row_of_the_ablations_changes_the_run_that_it_measures(chain: Chain):
    for name, row in ROWS.items():
        assert (chain.run_dir(row.phase, row.switches) != chain.run_dir(row.phase)) == bool(row.switches), name
        assert bool(row.metrics) == bool(row.switches), name
        chain.recipe(row.phase, row.switches)


@pytest.mark.parametrize(
    ("full", "other", "expected"),
    [
        ([1.0, 1.1], [1.3, 1.5], True),
        ([1.0, 1.1], [0.5, 0.9], True),
        ([1.0, 1.1], [1.05, 1.15], False),  # smaller than the spread
        ([1.0, 1.1], [1.5, 1.0], False),  # the sign changes
        ([1.0], [2.0], False),  # one seed shows nothing
        ([1.0, 1.0], [1.0, 1.0], False),
    ],
)
def test_a_difference_counts_beyond_the_spread_and_with_one_sign(full: list, other: list, expected: bool):
    assert is_significant(full, other) is expected


def test_the_table_compares_each_row_with_the_full_system_of_its_own_phase():
    values = {
        "tokenizer": {"psnr": [30.0, 30.2]},
        "frozen encoder": {"psnr": [28.0, 28.4]},
        "unified": {"flow": [0.50, 0.51], "gap": [0.2, 0.2]},
        "without L_align": {"flow": [0.50, 0.512], "gap": [0.1, 0.12]},
    }
    lines = table(values).splitlines()[2:]
    assert lines[0] == "| frozen encoder | psnr | 30.1000 | 28.2000 | -1.9000 | 0.2000 | lower | reproduced |"
    assert lines[1] == "| without L_align | flow | 0.5050 | 0.5060 | +0.0010 | 0.0100 | higher | no effect |"
    assert lines[2].endswith("| -0.0900 | 0.0000 | lower | reproduced |")


def test_what_acts_is_held_against_the_direction_of_the_paper():
    assert verdict([30.0, 30.2], [28.0, 28.4], paper=-1) == "reproduced"
    assert verdict([30.0, 30.2], [28.0, 28.4], paper=1) == "opposite"
    assert verdict([30.0, 30.2], [28.0, 28.4], paper=0) == "effect"
    assert verdict([30.0, 30.2], [30.1, 30.1], paper=-1) == "no effect"
    assert verdict([30.0], [28.0], paper=-1) == "one seed"


def test_the_curve_is_made_of_whole_rows_alone():
    values = {name: {"psnr": [29.0, 29.5], "vqa": [0.8, 0.81]} for name in CURVE.values()}
    values["without L_s"]["psnr"] = [30.0, 30.2]
    assert "| 0 | 0.1 | 30.10 | 0.20 | 0.805 | 0.010 |" in curve(values).splitlines()
    assert curve({name: values[name] for name in list(values)[1:]}) == ""


def test_the_points_of_the_curve_turn_its_two_switches(chain: Chain):
    for (weight, rate), name in CURVE.items():
        recipe = chain.recipe("tokenizer_encoder", ROWS[name].switches)
        held = recipe.objective.semantic_distillation_weight if recipe.model.semantic_distillation else 0.0
        assert (held, recipe.optimizer.groups["encoder"]) == (weight, rate), name


def test_rows_share_the_runs_that_their_switches_do_not_reach(chain: Chain):
    frozen = chain.needed("tokenizer_encoder", ROWS["frozen encoder"].switches)
    assert [step.name for step in frozen] == [
        "bootstrap_autoencoder",
        "bootstrap_mllm",
        "seed-3/tokenizer_init",
        "seed-3/tokenizer_decoder",
        "seed-3/tokenizer_encoder,encoder=frozen",
    ]
    assert set(frozen[-1].after) == {"data", "bootstrap_autoencoder", "bootstrap_mllm", "seed-3/tokenizer_decoder"}
    joint = {step.name: step for step in chain.needed("align_joint", ROWS["routing: uniform"].switches)}
    assert {"bootstrap_diffusion", "seed-3/tokenizer_encoder", "seed-3/align_connector,routing=uniform"} <= set(joint)
    assert joint["seed-3/align_joint,routing=uniform"].work.args[0].data.encoded is None


def test_an_unknown_row_is_refused_with_the_nearest(tmp_path: Path):
    with pytest.raises(UserError, match="--row: 'frozen encodr' is not a row; did you mean 'frozen encoder'"):
        ablate(tmp_path, "smoke", [0], ["frozen encodr"])


def test_a_finished_run_of_another_recipe_is_not_taken_for_this_one(tmp_path: Path):
    bootstrap = tmp_path / "bootstrap_autoencoder"
    (bootstrap / "pretrained").mkdir(parents=True)
    changed = Chain(tmp_path, "smoke", 0).recipe("bootstrap_autoencoder").model_copy(update={"global_batch": 17})
    changed.save(bootstrap / "recipe.yaml")
    with pytest.raises(UserError, match="bootstrap_autoencoder: holds a run of another recipe; it differs in global_b"):
        Chain(tmp_path, "smoke", 0).is_trained("bootstrap_autoencoder")
