"""`spar-scale doctor RECIPE` names, before a job waits in a queue, everything that `train` would refuse."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nano import NANO
from tiny_parts import make_parts
from tiny_runs import make_data, phase_values

from parallel.checkpoint.manifest import Manifest
from parallel.errors import UserError
from parallel.launch.environment import read_environment
from parallel.launch.exit_codes import DEFECT, DONE, REFUSED
from parallel.launch.run_lock import RunLock
from spar_scale.config.recipe import Recipe
from spar_scale.doctor.folder import check_folder
from spar_scale.doctor.preflight import preflight, sample_bytes, shared_memory
from spar_scale.models.internvl import build_mllm, save_mllm
from spar_scale.models.presets import resized
from spar_scale.phases import Phase, declared
from spar_scale.stages import meta_stage
from spar_scale.stages.perceptual import PART
from spar_scale.training.admission import _LOADERS, refusals
from spar_scale.training.parent import choose_parent

PHASES = ("bootstrap/mllm", "bootstrap/diffusion", "tokenizer/init", "align/connector", "align/joint")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_parts(tmp_path_factory.mktemp("parts"), NANO)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_data(folder, scenes=32, edits=16)
    return folder


@pytest.fixture
def recipe(tmp_path: Path, data: Path, parts: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SPAR_DEVICE", "cpu")
    assert read_environment() == (0, 1, 0)

    def make(phase: str, **changes: Any) -> Recipe:
        values = phase_values(tmp_path / "runs/own", phase, data, parts, "nano", **changes)
        return Recipe.model_validate_json(json.dumps(values))

    return make


def with_pretrained(recipe: Recipe, **pretrained: str) -> Recipe:
    model = recipe.model.model_copy(update={"pretrained": recipe.model.pretrained | pretrained})
    return recipe.model_copy(update={"model": model})


@pytest.mark.parametrize("phase", declared(), ids=lambda phase: phase.name)
def test_each_part_that_a_phase_takes_can_be_held_against_its_preset(phase: Phase):
    taken = {*phase.requires, *phase.accepts, *phase.requires_when} - {*phase.vision_only}
    assert taken <= {*_LOADERS, PART}


@pytest.mark.parametrize("phase", PHASES)
def test_what_can_be_trained_is_not_refused(phase: str, recipe: Callable[..., Recipe]):
    assert preflight(recipe(phase)) == DONE


def test_an_encoder_is_read_out_of_an_mllm_of_another_language_model(
    recipe: Callable[..., Recipe], parts: dict[str, str], tmp_path: Path
):
    other = resized(NANO, name="other", language={"mlp_width": 128})
    save_mllm(build_mllm(other.vision, other.language), tmp_path / "other")
    assert preflight(with_pretrained(recipe("tokenizer/init"), mllm=str(tmp_path / "other"))) == DONE
    assert preflight(with_pretrained(recipe("align/connector"), mllm=str(tmp_path / "other"))) == REFUSED


def _parent(recipe: Recipe, root: Path) -> Recipe:
    return recipe.model_copy(update={"init_from": "../before"})


def _has_saved(recipe: Recipe) -> None:
    (recipe.run_dir / "checkpoints/step-00000010").mkdir(parents=True)


def _noted_parent(recipe: Recipe, root: Path) -> Recipe:
    _has_saved(recipe)
    (recipe.run_dir / "parent.json").write_text(json.dumps({"run": "../x", "checkpoint": "step-1", "manifest": ""}))
    return _parent(recipe, root)


def _parent_gone(recipe: Recipe, root: Path) -> Recipe:
    _has_saved(recipe)
    record = {"run": "../before", "checkpoint": "step-00000010", "manifest": ""}
    (recipe.run_dir / "parent.json").write_text(json.dumps(record))
    return _parent(recipe, root)


def _another_checkpoint_there(recipe: Recipe, root: Path) -> Recipe:
    folder = root / "runs/before/checkpoints/step-00000010"
    folder.mkdir(parents=True)
    Manifest(10, {}, {}).write(folder)
    return _parent_gone(recipe, root)


def _damaged_parent(recipe: Recipe, root: Path) -> Recipe:
    (root / "runs/before/checkpoints/step-00000010").mkdir(parents=True)
    return _parent(recipe, root)


def _parent_behind_a_link(recipe: Recipe, root: Path) -> Recipe:
    (root / "runs").mkdir()
    for name in ("own", "before"):
        (root / "scratch" / name).mkdir(parents=True)
    (root / "runs/own").symlink_to(root / "scratch/own")
    return _parent(recipe, root)


def _part_gone(recipe: Recipe, root: Path) -> Recipe:
    return with_pretrained(recipe, pixel_autoencoder="../before/pretrained")


def _part_of_another_preset(recipe: Recipe, root: Path) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"preset": "tiny"})})


def _part_torn(recipe: Recipe, root: Path) -> Recipe:
    directory = root / "torn"
    directory.mkdir()
    for file in Path(recipe.model.pretrained["pixel_autoencoder"]).iterdir():
        content = file.read_bytes()
        (directory / file.name).write_bytes(content[:-9] if file.suffix == ".safetensors" else content)
    return with_pretrained(recipe, pixel_autoencoder=str(directory))


def _part_without_weights(recipe: Recipe, root: Path) -> Recipe:
    (root / "bare").mkdir()
    shutil.copy(Path(recipe.model.pretrained["pixel_autoencoder"]) / "config.json", root / "bare")
    return with_pretrained(recipe, pixel_autoencoder=str(root / "bare"))


def _published_part_gone(recipe: Recipe, root: Path) -> Recipe:
    model = with_pretrained(recipe, mllm="../pretrained/InternVL3-1B-hf").model
    return recipe.model_copy(update={"model": model.model_copy(update={"preset": "spar_1b"})})


def _part_without_tokenizer(recipe: Recipe, root: Path) -> Recipe:
    shutil.copytree(recipe.model.pretrained["mllm"], root / "bare", ignore=shutil.ignore_patterns("tokenizer.json"))
    return with_pretrained(recipe, mllm=str(root / "bare"))


def _perceptual_files_gone(recipe: Recipe, root: Path) -> Recipe:
    objective = recipe.objective.model_copy(update={"perceptual": "lpips_convnext"})
    return with_pretrained(recipe, perceptual="../pretrained/perceptual").model_copy(update={"objective": objective})


def _other_recipe_there(recipe: Recipe, root: Path) -> Recipe:
    _has_saved(recipe)
    recipe.model_copy(update={"seed": recipe.seed + 1}).save(recipe.run_dir / "recipe.yaml")
    return recipe


def _too_many_tensor_ranks(recipe: Recipe, root: Path) -> Recipe:
    return recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"tensor": 2})})


def _tensor_that_divides_nothing(recipe: Recipe, root: Path) -> Recipe:
    return recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"tensor": 7})})


def _nothing_encoded(recipe: Recipe, root: Path) -> Recipe:
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"encoded": "../encoded"})})


def _encoded_otherwise(recipe: Recipe, root: Path) -> Recipe:
    (root / "runs/encoded").mkdir(parents=True)
    manifest = {"version": 1, "made_of": {"preset": "nano", "precision": "bf16"}, "sources": {}}
    (root / "runs/encoded/manifest.json").write_text(json.dumps(manifest))
    return _nothing_encoded(recipe, root)


def _source_of_no_task(recipe: Recipe, root: Path) -> Recipe:
    sources = [source.model_copy(update={"name": f"{source.name}s"}) for source in recipe.data.sources]
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"sources": sources})})


REFUSALS: list[tuple[str, Callable[[Recipe, Path], Recipe], str]] = [
    ("tokenizer/decoder", _parent, "before/checkpoints holds no checkpoint; train that phase first"),
    ("tokenizer/decoder", _noted_parent, "init_from: found ../before, but this run started from ../x"),
    ("tokenizer/decoder", _parent_gone, "manifest.json: missing; this run started from that checkpoint: restore it"),
    ("tokenizer/decoder", _another_checkpoint_there, "is not the checkpoint that this run started from; restore it"),
    ("tokenizer/decoder", _damaged_parent, "init_from: every checkpoint is damaged"),
    ("tokenizer/decoder", _parent_behind_a_link, "is a symbolic link, and"),
    ("tokenizer/init", _part_gone, "before/pretrained; train the phase that writes it first"),
    ("tokenizer/init", _part_of_another_preset, "preset 'tiny' needs"),
    ("tokenizer/init", _part_torn, ".safetensors cannot be read"),
    ("tokenizer/init", _part_without_weights, "holds no diffusion_pytorch_model.safetensors"),
    ("align/joint", _part_of_another_preset, "has preset 'nano', this recipe has 'tiny'"),
    ("align/connector", _published_part_gone, "InternVL3-1B-hf; put OpenGVLab/InternVL3-1B-hf there, or name a"),
    ("align/connector", _part_without_tokenizer, "bare/tokenizer.json; published `-hf` directories have one"),
    ("tokenizer/init", _perceptual_files_gone, "expected one file (torchvision's convnext_small-0c510722.pth) in"),
    ("bootstrap/mllm", _other_recipe_there, "holds a run of another recipe; it differs in seed"),
    ("bootstrap/mllm", _too_many_tensor_ranks, "parallel: found tensor 2 x pipeline 1 in a world of 1 process"),
    ("bootstrap/mllm", _tensor_that_divides_nothing, "parallel.tensor: found 7"),
    ("bootstrap/mllm", _source_of_no_task, "data.sources: 'questionss' is not a task of this phase"),
    ("align/connector", _nothing_encoded, "encoded/manifest.json; run `spar-scale data encode RECIPE"),
    ("align/connector", _encoded_otherwise, "(precision: found bf16, expected fp32"),
]


@pytest.mark.parametrize(
    ("phase", "spoil", "message"), REFUSALS, ids=lambda value: getattr(value, "__name__", str(value)[:20]).strip("_")
)
def test_what_nobody_can_train_is_refused_with_the_reason(
    phase: str,
    spoil: Callable[[Recipe, Path], Recipe],
    message: str,
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    assert preflight(spoil(recipe(phase), tmp_path)) == REFUSED
    found = capsys.readouterr().out
    assert "bad  recipe" in found and message in found


@pytest.mark.parametrize("spoil", [spoil for phase, spoil, _ in REFUSALS if phase == "tokenizer/decoder"])
def test_train_refuses_a_parent_in_the_same_words(
    spoil: Callable[[Recipe, Path], Recipe], recipe: Callable[..., Recipe], tmp_path: Path
):
    spoiled = spoil(recipe("tokenizer/decoder"), tmp_path)
    with pytest.raises(UserError) as caught:
        choose_parent(spoiled, None)
    assert str(caught.value) in refusals(spoiled, 1, None)


def test_everything_that_is_missing_is_named_at_once(
    recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    spoiled = _parent(_other_recipe_there(_part_gone(recipe("tokenizer/decoder"), tmp_path), tmp_path), tmp_path)
    assert preflight(_tensor_that_divides_nothing(spoiled, tmp_path)) == REFUSED
    lines = [line for line in capsys.readouterr().out.splitlines() if "bad  recipe" in line]
    named = ("parallel.tensor", "holds a run of another recipe", "init_from", "model.pretrained.pixel_autoencoder")
    assert len(lines) == len(named)
    assert all(name in line for name, line in zip(named, lines, strict=True))


def test_what_a_chain_lacks_is_listed_once_for_all_phases_and_its_own_results_are_not_missed(
    recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    first = recipe("tokenizer/init").model_copy(update={"run_dir": tmp_path / "runs/tokenizer_init"})
    second = recipe("tokenizer/decoder").model_copy(
        update={"run_dir": tmp_path / "runs/tokenizer_decoder", "init_from": "../tokenizer_init"}
    )
    assert check_folder([first, second]) == DONE
    assert check_folder([second]) == REFUSED
    assert "init_from: " in capsys.readouterr().out
    assert check_folder([_part_gone(one, tmp_path) for one in (first, second)]) == REFUSED
    told = capsys.readouterr().out
    assert "before/pretrained; train the phase" in told and told.endswith("\n1 things are missing or wrong\n")
    assert "(tokenizer_init, tokenizer_decoder)" in told
    assert not (tmp_path / "runs").exists()  # it is asked before anything is to be written


def test_a_run_that_another_process_trains_is_refused_and_keeps_its_lock(
    recipe: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]
):
    wanted = recipe("bootstrap/mllm")
    (told, tell), (end, ask) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ask)
        with RunLock(wanted.run_dir):
            os.write(tell, b"1")
            os.read(end, 1)  # ends with the parent's side of the pipe
        os._exit(0)
    os.close(end)
    try:
        assert os.read(told, 1) == b"1"
        assert [preflight(wanted), preflight(wanted)] == [REFUSED, REFUSED]
        assert f"in use by process {child} on " in capsys.readouterr().out
    finally:
        os.close(ask)
        os.waitpid(child, 0)
    assert preflight(wanted) == DONE


def test_a_backend_that_is_not_here_is_a_fault_of_the_machine(
    recipe: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]
):
    assert preflight(recipe("bootstrap/mllm", attention="flash_attn_4")) == DEFECT
    assert "bad  attention" in capsys.readouterr().out


@pytest.mark.parametrize(("needed", "state"), [(0, "ok"), (1 << 60, "bad")])
def test_shared_memory_is_held_against_what_the_workers_need(tmp_path: Path, needed: int, state: str):
    found = shared_memory(tmp_path, needed)
    assert found.state == state
    assert ("--shm-size=" in found.text and "data.workers=0" in found.text) == (state == "bad")


@pytest.mark.parametrize(
    ("phase", "stored"), [("bootstrap/mllm", False), ("align/joint", False), ("align/joint", True)]
)
def test_the_bytes_of_a_sample_are_not_fewer_than_the_loaders(
    phase: str, stored: bool, recipe: Callable[..., Recipe], tmp_path: Path
):
    from spar_scale.data.loader import Loader, Source
    from spar_scale.stages import build
    from spar_scale.training.encode import encode, open_encoded

    wanted = recipe(phase)
    if stored:
        wanted = _nothing_encoded(wanted, tmp_path)
        encode(wanted)
        assert preflight(wanted) == DONE
    stage = meta_stage(wanted)
    encoded = open_encoded(wanted, build(wanted)) if stored else None
    sources = [Source(source.name, source.shards, source.weight) for source in wanted.data.sources]
    loader = Loader(
        sources, stage.sample, seed=1, global_batch=5, task_block=5, micro_batch=5, dp_rank=0, dp_size=1, workers=0,
        first_step=0, steps=4, encoded=encoded,
    )  # fmt: skip
    numbers = ("weight", "sample")  # 12 bytes a sample
    for batch in loader:
        found = sum(value.nbytes for name, value in batch.items() if hasattr(value, "nbytes") and name not in numbers)
        assert found <= 5 * sample_bytes(wanted, stage)
