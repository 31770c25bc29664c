"""What `export` writes: the run's model again, from that directory alone, by this program and by the libraries."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from PIL import Image
from ready_runs import make_run
from safetensors.torch import load_file
from tiny_parts import make_parts
from transformers import AutoTokenizer
from transformers.models.auto.modeling_auto import AutoModelForImageTextToText

from parallel.errors import UserError
from spar_scale import SparPipeline
from spar_scale.cli import main
from spar_scale.inference.sampler import scheduler
from spar_scale.models.internvl.vision import normalise
from spar_scale.models.presets import PRESETS
from spar_scale.training.export import trained_forward

PICTURES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
WORDS = "make the circle blue"


def said(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main([str(word) for word in words]) == 2
    return capsys.readouterr().err


def use(place: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> list[bytes | str]:
    """Return what every command makes of a run or an exported directory, without its name."""
    folder.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)).save(folder / "in.png")
    steps = ["--steps", 2, "-o", folder / "out.png"]
    made: list[bytes | str] = []
    for words in (
        ["generate", place, "a red circle", *steps, "--number", 2],
        ["edit", place, folder / "in.png", WORDS, *steps],
        ["reconstruct", place, folder / "in.png", "-o", folder / "out.png"],
        ["routes", place, "a red circle", "-o", folder / "out.png"],
    ):
        said(capsys, *words)
        made.append((folder / "out.png").read_bytes())
    return [*made, said(capsys, "ask", place, folder / "in.png", "what color is the circle?").splitlines()[0]]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run in bf16, its average, and exported directories of it in fp32 and in the run's precision."""
    folder = tmp_path_factory.mktemp("exports")
    parts = make_parts(folder / "parts")
    run = make_run(folder, "align", "joint", parts, moved=0.01, precision="bf16")
    assert main(["export", str(run), "--out", str(folder / "spar"), "--precision", "fp32"]) == 0
    assert main(["export", str(run), "--out", str(folder / "half")]) == 0
    model = trained_forward(run)[0].stage.model.state_dict()
    return {"run": run, "parts": folder / "parts", "model": model, "spar": folder / "spar", "half": folder / "half"}


@pytest.fixture
def spar(places: dict[str, Any], tmp_path: Path) -> Path:
    """A copy of the exported directory, to be damaged."""
    return shutil.copytree(places["spar"], tmp_path / "spar")


def test_every_command_makes_the_same_of_it_as_of_the_run_when_run_and_parts_are_gone(
    places: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    expected = use(places["run"], tmp_path / "a", capsys)
    away = [(places[name], places[name].with_name(f"{name}-away")) for name in ("run", "parts")]
    for here, there in away:
        here.rename(there)
    try:
        assert use(places["spar"], tmp_path / "b", capsys) == expected
    finally:
        for here, there in away:
            there.rename(here)


def test_all_weights_come_back_bit_by_bit(places: dict[str, Any]):
    found = SparPipeline.from_pretrained(places["spar"], device="cpu").forward.stage.model.state_dict()
    kept = {name: weight for name, weight in places["model"].items() if not name.startswith("alignment_head.")}
    assert found.keys() == kept.keys() and all(torch.equal(found[name], weight) for name, weight in kept.items())


def test_in_bf16_the_weights_are_rounded_once(places: dict[str, Any]):
    stored = [load_file(path) for path in places["half"].rglob("*.safetensors")]
    assert len(stored) == 4 and {tensor.dtype for tensors in stored for tensor in tensors.values()} == {torch.bfloat16}
    found = SparPipeline.from_pretrained(places["half"], device="cpu").forward.stage.model.state_dict()
    assert all(torch.equal(weight, places["model"][name].bfloat16().float()) for name, weight in found.items())


@torch.no_grad()
def test_transformers_reads_the_language_model_with_the_trained_tower(places: dict[str, Any]):
    forward, directory = trained_forward(places["run"])[0], places["spar"] / "mllm"
    loaded: Any = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    published, report = loaded
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tower = published.model.vision_tower.state_dict()
    assert all(torch.equal(weight, places["model"][f"tokenizer.vision_tower.{name}"]) for name, weight in tower.items())
    features = published.model.get_image_features(normalise(PICTURES), return_dict=True)["pooler_output"]
    torch.testing.assert_close(features, forward.features(PICTURES), atol=1e-5, rtol=1e-5)
    prompt = forward.text.question_prompt("what color is the circle ?", 16)
    logits = published(torch.tensor([prompt] * 2), pixel_values=normalise(PICTURES)).logits[:, -1]
    expected = forward.next_token([prompt] * 2, forward.features(PICTURES))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(directory).encode("a red circle") == forward.text.encode("a red circle")


@torch.no_grad()
def test_diffusers_reads_the_diffusion_transformer_and_the_solver(places: dict[str, Any]):
    forward = trained_forward(places["run"])[0]
    published = SanaTransformer2DModel.from_pretrained(places["spar"] / "transformer")
    captions, bounds = forward.condition([forward.text.generation_prompt("a red circle")] * 2)
    latents = torch.randn(2, *PRESETS["tiny"].latent_shape, generator=torch.Generator().manual_seed(1))
    times = torch.tensor([300.0, 900.0])
    found = published(latents, captions.unflatten(0, (2, -1)), times, return_dict=False)[0]
    torch.testing.assert_close(found, forward.velocity(latents, times, captions, bounds), atol=1e-5, rtol=1e-5)
    solvers: list[Any] = [DPMSolverMultistepScheduler.from_pretrained(places["spar"] / "scheduler"), scheduler(1.0)]
    for solver in solvers:
        solver.set_timesteps(5)
    assert torch.equal(solvers[0].sigmas, solvers[1].sigmas)
    assert solvers[0].config.prediction_type == "flow_prediction"


def test_python_draws_what_the_command_draws(
    places: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pipeline = SparPipeline.from_pretrained(places["spar"], device="cpu")
    drawn = pipeline.generate(["a red circle"] * 2, seed=3, steps=2)
    said(capsys, "generate", places["spar"], "a red circle", "-o", tmp_path / "a.png", "--seed", 4, "--steps", 2)
    assert np.abs(np.array(drawn[1], int) - np.array(Image.open(tmp_path / "a.png"), int)).max() <= 1  # batch of two
    drawn[0].save(tmp_path / "b.png")
    edited = pipeline.edit(drawn[0], [WORDS, "make the circle red"], steps=2)
    assert len(edited) == 2 and np.any(np.array(edited[0]) != np.array(edited[1]))
    assert edited[0].tobytes() == pipeline.edit([tmp_path / "b.png"] * 2, WORDS, steps=2)[0].tobytes()
    assert pipeline.ask(drawn[0], "what color is the circle?") == pipeline.ask(
        str(tmp_path / "b.png"), "What color is the circle"
    )
    with pytest.raises(ValueError, match="2 pictures and 3 instructions"):
        pipeline.edit(drawn, [WORDS] * 3)
    with pytest.raises(UserError, match="unknown words: 'redd'"):
        pipeline.generate("a redd circle")


def test_importing_the_package_is_light():
    code = "import sys, spar_scale; assert 'torch' not in sys.modules; spar_scale.SparPipeline"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_card_and_the_record_say_what_it_is(places: dict[str, Any]):
    card, record = (places["spar"] / "README.md").read_text(), json.loads((places["spar"] / "spar.json").read_text())
    assert "# SPAR, preset tiny" in card and "| align joint | 1 | 4 | generation: none (1) |" in card
    assert record["sizes"]["vision.width"] == 128 and record["picture_size"] == 32 and record["precision"] == "fp32"
    assert record["recipe"]["stage"] == "align"
    assert json.loads((places["half"] / "spar.json").read_text())["precision"] == "bf16"


def test_a_name_that_is_taken_is_refused_and_a_failure_leaves_nothing(
    places: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "taken").mkdir()
    assert "taken exists; give the name of a new" in refused(
        capsys, "export", places["run"], "--out", tmp_path / "taken"
    )
    config = places["parts"] / "diffusion" / "config.json"
    kept = config.read_text()
    config.unlink()
    try:
        assert "model.pretrained.diffusion" in refused(capsys, "export", places["run"], "--out", tmp_path / "new")
    finally:
        config.write_text(kept)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_run_that_does_not_train_all_of_spar_is_refused(
    places: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    parts = {path.name: str(path) for path in places["parts"].iterdir()}
    run = make_run(tmp_path, "align", "connector", parts)
    error = refused(capsys, "export", run, "--out", tmp_path / "new")
    assert "which does not train all of SPAR; a run of stage 'align', phase 'joint', or stage 'instruct'" in error
    assert "holds no recipe.yaml" in refused(capsys, "export", places["spar"], "--out", tmp_path / "new")


def _cut(spar: Path) -> None:
    path = spar / "conditioning" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _other_size(spar: Path) -> None:
    record = json.loads((spar / "spar.json").read_text())
    record["sizes"]["vision.layers"] = 5
    (spar / "spar.json").write_text(json.dumps(record))


DAMAGES = {
    "a weight": (_cut, "conditioning/model.safetensors: is missing or is not the file that was written"),
    "a file": (
        lambda spar: (spar / "mllm" / "generation_config.json").unlink(),
        "mllm/generation_config.json: is missing",
    ),
    "the preset": (_other_size, "found preset 'tiny' with vision.layers = 5, this program has 4"),
    "the record": (lambda spar: (spar / "spar.json").write_text("{}"), "spar.json: version: found nothing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_directory_is_refused(spar: Path, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    change, message = DAMAGES[damage]
    change(spar)
    assert message in refused(capsys, "generate", spar, "a red circle", "-o", tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()
