"""A recipe is read whole or refused whole: every fault at once, and never a byte of it executed."""

import os
from pathlib import Path
from typing import Any

import pytest

from parallel.errors import UserError
from spar_scale.config.recipe import Recipe, behind_link, beside, differences, load_recipe, may_change_at_resume
from spar_scale.config.settings import load
from spar_scale.phases import phase_names

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.name not in ("base.yaml", "world.yaml"))

GOOD = """\
stage: tokenizer
phase: init
model: {preset: tiny}
run_dir: runs/x
global_batch: 8
train: {steps: 10}
optimizer: {lr: 1e-4}
data: {task_block: 8, sources: [{name: images, shards: "x-*.tar"}]}
checkpoint: {every: 5}
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, list(overrides))
    return str(caught.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_house_loads(path: Path):
    assert load_recipe(path).run_dir.name == path.stem


def test_there_are_recipes():
    assert {path.stem for path in RECIPES} >= {"bootstrap_autoencoder", "tokenizer_init"}


@pytest.mark.parametrize("folder", ["tiny", "smoke", "full", "spar_1b", "spar_3b"])
def test_each_phase_starts_from_the_one_before_in_its_own_folder(folder: str):
    phases = [phase for phase in phase_names() if (ROOT / "recipes" / folder / f"{phase}.yaml").exists()]
    recipes = {phase: load_recipe(ROOT / "recipes" / folder / f"{phase}.yaml") for phase in phases}
    runs = {recipe.run_dir: phase for phase, recipe in recipes.items()}
    before = {
        phase: runs[Path(os.path.normpath(recipe.run_dir / recipe.init_from))]
        for phase, recipe in recipes.items()
        if recipe.init_from is not None
    }
    last = "tokenizer_high_resolution" if "tokenizer_high_resolution" in phases else "tokenizer_encoder"
    assert before == {
        "tokenizer_decoder": "tokenizer_init",
        "tokenizer_encoder": "tokenizer_decoder",
        **({last: "tokenizer_encoder"} if last != "tokenizer_encoder" else {}),
        "align_joint": "align_connector",
        "instruct": "align_joint",
    }
    for phase in ("align_joint", "instruct"):
        tokenizer = Path(os.path.normpath(recipes[phase].run_dir / recipes[phase].model.pretrained["tokenizer"]))
        assert (runs[tokenizer.parent], tokenizer.name) == (last, "pretrained")
    assert len({recipe.model.preset for recipe in recipes.values()}) == 1


@pytest.mark.parametrize("preset", ["spar_1b", "spar_3b"])
def test_a_block_of_the_large_recipes_fills_64_ranks(preset: str):
    for path in sorted((ROOT / "recipes" / preset).glob("[!b]*.yaml")):
        recipe = load_recipe(path)
        assert (recipe.model.preset, recipe.precision) == (preset, "bf16")
        assert recipe.global_batch % recipe.data.task_block == 0
        assert recipe.data.task_block % (64 * recipe.parallel.micro_batch) == 0, path


def test_every_world_loads():
    from spar_scale.data.shapes_world import World

    worlds = list((ROOT / "recipes").rglob("world.yaml"))
    assert worlds and all(load(path, World).scenes > 0 for path in worlds)


def test_exponent_without_a_point_is_a_number(good: Path):
    assert load_recipe(good).optimizer.lr == 1e-4
    assert load_recipe(good, ["optimizer.lr=3e-5"]).optimizer.lr == 3e-5


OVERRIDES = [
    (["train.stepz=3"], ["train.stepz: found an unknown key", "did you mean 'steps'?"]),
    (["lr=1e-3"], ["lr: found an unknown key", "did you mean 'optimizer.lr'?"]),
    (["model.dropout=0.1"], ["model.dropout: found an unknown key"]),
    (["train.steps=ten"], ['train.steps: found "ten", must be a valid integer']),
    (["train.steps='10'"], ['train.steps: found "10", must be a valid integer']),
    (["train.steps=true"], ["train.steps: found true, must be a valid integer"]),
    (["train.steps=0"], ["train.steps: found 0, must be greater than or equal to 1"]),
    (["train=5"], ["train: found 5, must be a mapping"]),
    (["optimizer.lr=.nan"], ["optimizer.lr: found NaN, must be a finite number"]),
    (["precision=bf61"], ["precision: found \"bf61\", must be 'fp32' or 'bf16'; did you mean 'bf16'?"]),
    (["parallel.zero=0"], ["parallel.zero: found 0, must be 1, 2 or 3"]),
    (["parallel.micro_batch=0"], ["parallel.micro_batch: found 0, must be greater than or equal to 1"]),
    (["phase=inti"], ['phase: found "inti"', "did you mean 'init'?"]),
    (["phase=joint"], ['phase: found "joint", stage tokenizer has init, decoder, encoder']),
    (
        ["parallel.pipeline=2", "parallel.zero=2"],
        [
            "parallel.zero: found 2 with parallel.pipeline 2, a pipeline needs ZeRO stage 1; nearest that fit:",
            "parallel.pipeline=2 parallel.zero=1 or parallel.pipeline=1 parallel.zero=2",
        ],
    ),
    (
        ["optimizer.name=muon"],
        ["optimizer.clip: found 1.0 with optimizer.name muon", "nearest that fit: optimizer.clip=0 or"],
    ),
    (
        ["optimizer.name=muon", "optimizer.clip=0", "parallel.tensor=2"],
        ["parallel.tensor: found 2 with optimizer", "parallel.tensor=1 or optimizer.name=adamw parallel.tensor=2"],
    ),
    (
        ["optimizer.name=muon", "optimizer.clip=0", "parallel.pipeline=3"],
        ["parallel.pipeline: found 3 with optim", "parallel.pipeline=1 or optimizer.name=adamw parallel.pipeline=3"],
    ),
    (["guards.timeout_s=4"], ["guards.timeout_s: found 4, must be greater than or equal to 5"]),
    (["optimizer.min_lr=1"], ["optimizer.min_lr: found 1, must not be above optimizer.lr (0.0001)"]),
    (["data.task_block=9"], ["data.task_block: found 9, must not be above global_batch (8)"]),
    (["model.routing=uniform"], ['model.routing: found "uniform", but stage tokenizer does not read it']),
    (["tracking.uri=somewhere"], ['tracking.uri: found "somewhere", must be null, an MLflow server']),
    (
        ["init_from=../x"],
        ["init_from: found", "tokenizer/encoder and tokenizer/high_resolution and align/joint and instruct would"],
    ),
    (["objective.latent_power_weight=0.5"], ["objective.latent_power_weight: found 0.5", "only bootstrap/auto"]),
    (["train.steps"], ["override: found 'train.steps', must be dotted.key=value"]),
    (["train..steps=1"], ["override: found 'train..steps=1', must be dotted.key=value"]),
    (["train.steps.x=1"], ["override train.steps.x: train.steps is 10, which has no entry 'x'"]),
    (["data.sources.1.weight=1"], ["data.sources is a list of 1, which has no entry '1'"]),
    (["data.sources.0.weight=-1"], ["data.sources.0.weight: found -1, must be greater than 0"]),
    (
        ["data.sources.0.text=TXT"],
        ['data.sources.0.text.0: found "TXT", must be the extension of a member in lower case'],
    ),
    (
        ["data.sources.0.text=[txt, 'json:']"],
        ['data.sources.0.text.1: found "json:", must be the extension of a member'],
    ),
    (["data.sources.0.text=[]"], ["data.sources.0.text: found a list of 0, "]),
    (["data.sources.0.fit=pad"], ["data.sources.0.fit: found \"pad\", must be 'crop' or 'stretch'"]),
    (["data.sources=[]"], ["data.sources: found a list of 0"]),
    (["train.steps=[1"], ["override train.steps, line 1"]),
    (["seed=010"], ['seed: found "010", must be a valid integer; a number has no leading zero; write 10']),
    (["train.steps=1_000"], ["a number has no separators; write 1000"]),
    (["train.steps=1e3"], ["train.steps: found 1000.0", "write 1000"]),
    (["train.steps='10'"], ["write 10 without quotes"]),
    (["optimizer.betas=[0.9, 0_95]"], ["optimizer.betas.1"]),
    (["parallel.zero=03"], ["must be 1, 2 or 3; a number has no leading zero; write 3"]),
    (["tracking.mirror=yes"], ["tracking.mirror: found", "write true"]),
    (["model.pretrained={vision: 3}"], ["model.pretrained.vision: found 3", "put a text in quotes"]),
    (["data=" + "[" * 210 + "]" * 210], ["nested too deeply"]),
    (["<<={seed: 1}"], ["<<: found an unknown key"]),
    (["extends=base.yaml"], ["extends: found an unknown key"]),
    (["seeed=[a"], ["seeed: found an unknown key"]),
    (["run_dir=\udcff"], ["override run_dir: found '\\udcff', must be UTF-8 text"]),
    (["run_dir="], ["run_dir: found", "must end in the name of the run's own directory"]),
    (["run_dir=."], ["run_dir: found", "must end in the name of the run's own directory"]),
    (["run_dir=runs/.."], ["run_dir: found", "must end in the name of the run's own directory"]),
    (["run_dir=../.."], ["run_dir: found", "must end in the name of the run's own directory"]),
    (["run_dir=/"], ["run_dir: found", "must end in the name of the run's own directory"]),
    (["run_dir=a\0b"], ["run_dir: found", "none of them NUL"]),
    (["run_dir=~no-such-user/x"], ["run_dir: found", "this machine has no user no-such-user"]),
    (["tracking.experiment="], ['tracking.experiment: found "", must be a text of one or more characters']),
    (["data.sources.0.shards="], ['data.sources.0.shards: found "", must be a text of one or more characters']),
]


@pytest.mark.parametrize(("overrides", "expected"), OVERRIDES, ids=lambda value: " ".join(value)[:40])
def test_override_is_refused_with_key_value_and_rule(good: Path, overrides: list[str], expected: list[str]):
    message = refusal(good, *overrides)
    assert message.startswith(f"{good}: 1 error\n") or message.count("\n") > 1, message
    for text in expected:
        assert text in message


def test_override_reaches_into_a_list_and_makes_a_missing_section(good: Path):
    recipe = load_recipe(good, ["data.sources.0.weight=2.5", "parallel.zero=3", "run_dir=elsewhere"])
    assert (recipe.data.sources[0].weight, recipe.parallel.zero, recipe.run_dir) == (2.5, 3, Path("elsewhere"))


TAKEN_AS_TEXT = [
    ("run_dir=runs/exp #3", "run_dir", "runs/exp #3"),
    ("run_dir=20261130", "run_dir", "20261130"),
    ("run_dir=1e5", "run_dir", "1e5"),
    ("run_dir=runs/a: b", "run_dir", "runs/a: b"),
    ("run_dir=a,b=c", "run_dir", "a,b=c"),
    ("run_dir=[a", "run_dir", "[a"),
    ("run_dir=null", "run_dir", "null"),
    ("run_dir=it's", "run_dir", "it's"),
    ('run_dir="a" and "b"', "run_dir", '"a" and "b"'),
    ('run_dir="runs/x"', "run_dir", "runs/x"),
    ("run_dir='it''s'", "run_dir", "it's"),
    ('run_dir="tab\\there"', "run_dir", "tab\there"),
    ("tracking.experiment=42", "tracking.experiment", "42"),
    ("tracking.experiment=yes", "tracking.experiment", "yes"),
    ('tracking.uri="sqlite:///a b"', "tracking.uri", "sqlite:///a b"),
    ("tracking.uri=null", "tracking.uri", None),
    ("tracking.uri=", "tracking.uri", None),
    ('data.encoded="null"', "data.encoded", "null"),
    ("data.encoded=~", "data.encoded", None),
    ("data.sources.0.shards=*.tar", "data.sources.0.shards", "*.tar"),
    ("data.sources.0.shards={a,b}-[0-9].tar", "data.sources.0.shards", "{a,b}-[0-9].tar"),
    ("data.sources.0.text=txt", "data.sources.0.text", ["txt"]),
    ("data.sources.0.text=[json:a b, txt]", "data.sources.0.text", ["json:a b", "txt"]),
    ("data.sources.0.name=10", "data.sources.0.name", "10"),
    ("model.pretrained.mllm=&a", "model.pretrained.mllm", "&a"),
    ("model.pretrained={mllm: ../a}", "model.pretrained.mllm", "../a"),
    ("optimizer.groups.main=1e-1", "optimizer.groups.main", 0.1),
    ("seed=0x10", "seed", 16),
]


@pytest.mark.parametrize(("override", "key", "expected"), TAKEN_AS_TEXT, ids=lambda value: str(value)[:40])
def test_an_override_is_text_where_the_schema_has_a_text_and_yaml_elsewhere(
    good: Path, override: str, key: str, expected: object
):
    good.write_text(GOOD.replace("stage: tokenizer\nphase: init", "stage: align\nphase: connector"))  # reads all keys
    recipe = load_recipe(good, [override])
    place: Any = recipe.model_dump(mode="json")
    for part in key.split("."):
        place = place[int(part)] if isinstance(place, list) else place[part]
    assert place == expected
    recipe.save(good.parent / "saved.yaml")
    assert load_recipe(good.parent / "saved.yaml") == recipe


def test_home_is_written_as_a_tilde(good: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    recipe = load_recipe(good, ["run_dir=~/x", "data.sources.0.shards=~/*.tar", "model.pretrained.mllm=~/m"])
    found = (str(recipe.run_dir), recipe.data.sources[0].shards, recipe.model.pretrained["mllm"])
    assert found == ("/home/me/x", "/home/me/*.tar", "/home/me/m")


@pytest.mark.parametrize("reference", ["../init", "../init/.", "../dec/../init", "x/../../init"])
def test_a_reference_is_beside_the_run_directory_as_it_is_written(tmp_path: Path, reference: str):
    (tmp_path / "runs/init").mkdir(parents=True)
    (tmp_path / "scratch/dec").mkdir(parents=True)
    (tmp_path / "runs/dec").symlink_to(tmp_path / "scratch/dec")
    assert beside(tmp_path / "runs/dec", reference) == tmp_path / "runs/init"
    assert behind_link(tmp_path / "runs/dec", reference) == ""


def test_what_exists_only_behind_a_link_is_named(tmp_path: Path):
    (tmp_path / "scratch/dec").mkdir(parents=True)
    (tmp_path / "scratch/init").mkdir()
    (tmp_path / "dec").symlink_to(tmp_path / "scratch/dec")
    assert beside(tmp_path / "dec", "../init") == tmp_path / "init"
    assert f"symbolic link, and {tmp_path}/scratch/init" in behind_link(tmp_path / "dec", "../init")
    assert behind_link(tmp_path / "dec", "../nowhere") == ""


CONTRADICTIONS = [
    (["parallel.zero=3", "parallel.pipeline=2"], ["parallel.zero"]),
    (["tracking.uri=localhost:5000"], ["tracking.uri"]),
    (["parallel.zero=3", "parallel.pipeline=2", "data.task_block=9"], ["parallel.zero", "data.task_block"]),
    (["optimizer.min_lr=1", "seed=x"], ["seed", "optimizer.min_lr"]),
]


@pytest.mark.parametrize(("overrides", "keys"), CONTRADICTIONS, ids=str)
def test_every_contradiction_is_reported_once(good: Path, overrides: list[str], keys: list[str]):
    head, *errors = refusal(good, *overrides).splitlines()
    assert head == f"{good}: {'1 error' if len(keys) == 1 else f'{len(keys)} errors'}"
    assert [error.split(":")[0].strip() for error in errors] == keys


def test_a_rule_of_a_whole_world_is_one_line_without_the_worlds_keys(tmp_path: Path):
    from spar_scale.data.shapes_world import World

    path = tmp_path / "world.yaml"
    path.write_text("unseen_looks: [red cross]\n")
    with pytest.raises(UserError) as caught:
        load(path, World)
    head, *errors = str(caught.value).splitlines()
    assert head.endswith("1 error") and [error.split(":")[0] for error in errors] == ["  unseen_looks"]


def test_all_errors_are_reported_at_once(good: Path):
    message = refusal(good, "train.steps=ten", "seeed=1", "phase=inti", "parallel.zero=2", "parallel.pipeline=2", "x")
    assert "6 errors" not in message and f"{good}: 5 errors" in message
    for key in ("train.steps:", "seeed:", "phase:", "parallel.zero:", "override:"):
        assert key in message


def test_missing_keys_are_named(tmp_path: Path):
    path = tmp_path / "empty.yaml"
    path.write_text("stage: tokenizer\n")
    message = refusal(path)
    assert "phase: missing, but required" in message and "train: missing, but required" in message


FILES = [
    ("a: [1", "line 1"),
    ("", "found null, must be a mapping"),
    ("- 1\n- 2", "found a list of 2, must be a mapping"),
    ("seed: 1\nseed: 2", "line 2, column 1: the key 'seed' appears twice"),
    ("a: {b: 1, b: 2}", "the key 'b' appears twice"),
    ("a: &x [1]\nb: *x", "anchors (&) and aliases (*) are not allowed"),
    ("1: x", "a key must be plain text"),
    ("? [1, 2]\n: x", "a key must be plain text"),
    ("a: \x00", "not YAML"),
    ("a: " + "[" * 5000, "nested too deeply"),
    ("extends: 3", "extends: found 3"),
    ("extends: bad.yaml", "extends: a cycle (bad.yaml -> bad.yaml)"),
    ("extends: nowhere.yaml", "No such file"),
]


@pytest.mark.parametrize(("text", "expected"), FILES, ids=lambda value: value[:20].replace("\n", "|"))
def test_file_that_is_no_recipe_is_refused_with_its_name(tmp_path: Path, text: str, expected: str):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    message = refusal(path)
    assert expected in message and str(tmp_path) in message


@pytest.mark.parametrize("content", [b"\xff\xfe\x00bad", b"\x80abc"])
def test_bytes_that_are_no_text_are_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "bytes.yaml"
    path.write_bytes(content)
    assert "not UTF-8 text" in refusal(path)


def test_missing_file_and_directory_are_refused(tmp_path: Path):
    assert "No such file" in refusal(tmp_path / "absent.yaml")
    assert "directory" in refusal(tmp_path).lower()


@pytest.mark.parametrize("where", ["file", "override"])
def test_python_tag_is_refused_and_not_executed(good: Path, where: str):
    trace = good.parent / "executed"
    payload = f"!!python/object/apply:os.mkdir ['{trace}']"
    if where == "file":
        good.write_text(GOOD + f"seed: {payload}\n")
        message = refusal(good)
    else:
        message = refusal(good, f"seed={payload}")
    assert "python/object/apply" in message
    assert not trace.exists()


def test_child_lays_its_keys_over_the_parent(good: Path):
    folder = good.parent / "below"
    folder.mkdir()
    child = folder / "child.yaml"
    child.write_text("extends: ../good.yaml\ntrain: {log_every: 2}\nmodel: {pretrained: {a: b}}\n")
    recipe = load_recipe(child)
    assert (recipe.train.steps, recipe.train.log_every) == (10, 2)
    assert (recipe.model.preset, recipe.model.pretrained) == ("tiny", {"a": "b"})


def test_circle_over_two_files_is_refused(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml")
    (tmp_path / "b.yaml").write_text("extends: a.yaml")
    assert "a cycle (a.yaml -> b.yaml -> a.yaml)" in refusal(tmp_path / "a.yaml")


def test_saved_recipe_reads_back_equal(good: Path):
    recipe = load_recipe(good, ["optimizer.lr=1e-7", "optimizer.groups={encoder: 0.1}"])
    recipe.save(good.parent / "saved.yaml")
    assert load_recipe(good.parent / "saved.yaml") == recipe
    assert sorted(path.name for path in good.parent.iterdir()) == ["good.yaml", "saved.yaml"]


def test_recipe_made_in_python_obeys_the_same_rules(good: Path):
    values = load_recipe(good).model_dump(mode="json")
    values["parallel"] |= {"pipeline": 2, "zero": 3}
    with pytest.raises(ValueError, match=r"parallel.zero: found 3 with parallel.pipeline 2"):
        Recipe.model_validate(values, strict=False)


def test_differences_are_dotted_keys(good: Path):
    old = load_recipe(good)
    new = load_recipe(good, ["parallel.zero=3", "optimizer.groups={encoder: 0.1}", "data.workers=0", "seed=1"])
    assert differences(old, old) == []
    assert differences(old, new) == [
        "data.workers", "optimizer.groups", "optimizer.groups.encoder", "parallel.zero", "seed",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "free"),
    [
        ("parallel.zero", True),
        ("data.workers", True),
        ("guards.max_bad_fraction", True),
        ("train.log_every", True),
        ("train.steps", False),
        ("data.task_block", False),
        ("seed", False),
        ("parallel_other", False),
    ],
)
def test_only_what_changes_no_result_may_change_at_resume(key: str, free: bool):
    assert may_change_at_resume(key) is free
