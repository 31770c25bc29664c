"""Scores: a model that does all it is asked reaches 1, its control 0; what is written is what was measured."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from ready_runs import make_run
from tiny_parts import make_parts
from torch import nn

from parallel.errors import UserError
from spar_scale.cli import main
from spar_scale.data.shapes_language import captions
from spar_scale.data.shapes_render import render
from spar_scale.data.shapes_world import World, is_unseen, sample_scene
from spar_scale.data.shards import make_world
from spar_scale.data.spec import SampleSpec
from spar_scale.evaluation import editing, evaluate, generation
from spar_scale.evaluation.requests import KINDS, UNSEEN_KINDS, select_requests
from spar_scale.evaluation.scenes import edits_of, scenes_of
from spar_scale.models.presets import PRESETS
from spar_scale.objectives.quality import ssim
from spar_scale.runs import ablation, demo, parity
from spar_scale.runs.processes import Step
from spar_scale.stages import Stage
from spar_scale.stages.forward import Forward

WORLD = World(seed=4, scenes=0, heldout=40, edits=0, heldout_edits=24, unseen=0.3)
TRAINED = [sample_scene(WORLD, "scenes", number) for number in range(1500)]
HELD_OUT = [sample_scene(WORLD, "heldout", number) for number in range(1500)]


TINY = PRESETS["tiny"]
MODEL = Forward(Stage(nn.Identity(), [], (), {}, {}, SampleSpec(task="images", image_size=32)), TINY)
"""Has no layers: what stands for drawing gives known pictures."""


def by_caption(scenes):
    return {text: scene for scene in scenes for text in captions(scene)}


def images_of(scenes):
    return torch.from_numpy(render(scenes, 32)).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation") / "data"
    make_world(WORLD, folder)
    return folder


@pytest.fixture(scope="module")
def root(data):
    """The last phases of a chain with the weights of the seed, and their data beside them."""
    root = data.parent
    parts = make_parts(root / "parts")
    for stage, phase in (("bootstrap", "mllm"), ("tokenizer", "encoder"), ("instruct", "joint")):
        make_run(root, stage, phase, parts)
    (root / "instruct_joint").rename(root / "instruct")
    return root


def test_requests_are_what_captions_say_and_unseen_ones_what_no_training_caption_says():
    trained, held_out = by_caption(TRAINED), by_caption(HELD_OUT)
    for kind in KINDS:
        seen = select_requests(WORLD, kind, False, 50)
        assert len(seen) == 50 and select_requests(WORLD, kind, False, 50) == seen != select_requests(
            WORLD, kind, False, 50, seed=1
        )
        said = [trained[request.prompt] for request in seen if request.prompt in trained]
        assert len(said) > 30 and not any(is_unseen(WORLD, scene) for scene in said)
    for kind in UNSEEN_KINDS:
        new = select_requests(WORLD, kind, True, 50)
        assert len(new) == 50 and not any(request.prompt in trained for request in new)
        assert any(request.prompt in held_out for request in new)
    assert select_requests(WORLD, "color", True, 50) == []
    keeping = World(unseen_looks=("red circle",))
    assert {request.prompt for request in select_requests(keeping, "color", True, 5)} == {"a red circle"}


def test_a_model_that_listens_reaches_1_and_the_control_stays_at_0(monkeypatch):
    scenes = by_caption(HELD_OUT)
    monkeypatch.setattr(
        generation, "generate", lambda model, prompts, noise, sampling: images_of([scenes[p] for p in prompts])
    )
    asked = {(kind, unseen): [r for r in select_requests(WORLD, kind, unseen, 400) if r.prompt in scenes][:6]
             for kind in KINDS for unseen in (False, True)}  # fmt: skip
    monkeypatch.setattr(generation, "select_requests", lambda world, kind, unseen, count: asked[kind, unseen])
    scores, section = generation.draw_and_judge(MODEL, TINY.sampling, WORLD, 6)
    assert scores["t2i.average"] == scores["t2i.unseen.average"] == 1.0 and scores["t2i.control"] <= 0.04
    assert set(scores) == {
        *(f"t2i.{kind}" for kind in (*KINDS, "average", "control")),
        *(f"t2i.control.{kind}" for kind in KINDS),
        *(f"t2i.unseen.{kind}" for kind in (*UNSEEN_KINDS, "average")),
    }
    assert [row["seed"] for row in section.rows] == list(range(54)) and section.tiles is not None
    assert all(row["passed"] and len(row["found"]) >= 1 for row in section.rows)


def test_a_model_that_draws_one_picture_for_all_is_right_by_chance_alone(monkeypatch):
    scene = by_caption(HELD_OUT)["a red circle on the left"]
    monkeypatch.setattr(generation, "generate", lambda model, prompts, *_: images_of([scene] * len(prompts)))
    scores, _ = generation.draw_and_judge(MODEL, TINY.sampling, WORLD, 18)
    assert scores["t2i.color"] == scores["t2i.control.color"] == pytest.approx(1 / 18)
    assert scores["t2i.two"] == scores["t2i.count"] == scores["t2i.relation"] == 0


def test_edits_that_are_the_target_are_exact_and_copies_are_not(data, monkeypatch):
    edits = edits_of(data, 24)
    targets = {(e.instruction, e.source): e.target for e in edits}

    def obey(model, sources, instructions, noise, sampling):
        of = [next(t for (said, source), t in targets.items() if said == i and source.equal(s))
              for i, s in zip(instructions, sources, strict=True)]  # fmt: skip
        return (torch.stack(of) + 0.01).clamp(0, 1)

    monkeypatch.setattr(editing, "edit", obey)
    scores, section = editing.edit_and_judge(MODEL, TINY.sampling, edits, WORLD.shapes)
    assert scores["edit.exact"] == scores["edit.objects"] == 1.0 and scores["edit.psnr"] > 38
    assert scores["edit.copy"] == 0 and scores["edit.control"] <= 0.1
    assert {name.rpartition(".")[2] for name in scores} >= {"color", "shape", "remove", "add"}
    assert section.columns == ("source", "target", "ours") and len(section.rows) == 24
    monkeypatch.setattr(editing, "edit", lambda model, sources, *_: sources)
    copied, _ = editing.edit_and_judge(MODEL, TINY.sampling, edits, WORLD.shapes)
    assert copied["edit.exact"] == copied["edit.copy"] == 0


def test_ssim_is_1_for_equal_pictures_and_falls_with_noise_and_lost_structure(data):
    images = torch.stack([scene.image for scene in scenes_of(data, 8)])
    assert torch.allclose(ssim(images, images), torch.ones(8), atol=1e-5)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    little, much = ((images + scale * noise).clamp(0, 1) for scale in (0.02, 0.2))
    flat = images.mean((2, 3), keepdim=True).expand_as(images)
    assert (ssim(images, little) > ssim(images, much)).all() and (ssim(flat, images) < 0.95).all()
    one, other = torch.full((1, 1, 11, 11), 0.2), torch.full((1, 1, 11, 11), 0.6)
    assert ssim(one, other).item() == pytest.approx((2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4), rel=1e-4)


def test_everything_is_measured_and_written(root, monkeypatch, capsys):
    (root / "scores.json").write_text(json.dumps({"core_seconds.instruct": 7.5, "t2i.old": 1.0}))
    monkeypatch.setattr(evaluate, "QUICK", evaluate.Counts(scenes=6, questions=5, per_kind=1, edits=4))
    assert main(["evaluate", str(root / "instruct"), "--quick"]) == 0
    printed = capsys.readouterr().out
    scores = json.loads((root / "scores.json").read_text())
    assert "t2i.old" not in scores and scores["core_seconds.instruct"] == 7.5 and "core_seconds.instruct" in printed
    wanted = (
        "tokenizer.psnr tokenizer.ssim tokenizer.psnr_tokenizer_encoder t2i.judge_ceiling vqa.before vqa.after"
        " vqa.blind t2i.average t2i.control t2i.control.two t2i.unseen.relation t2i.unseen.average edit.exact"
        " edit.objects edit.psnr edit.copy edit.control flow.right flow.shuffled"
        " flow.edit.right flow.edit.mirrored"
    )
    assert set(wanted.split()) <= set(scores) and all(math.isfinite(value) for value in scores.values())
    assert "tokenizer.psnr_frozen_encoder" not in scores and "tokenizer.psnr_tokenizer_init" not in scores
    details = json.loads((root / "evaluation" / "details.json").read_text())
    assert {name: len(section["rows"]) for name, section in details.items()} == {
        "reconstruction": 6, "questions": 5, "generation": 9, "editing": 4, "routes": 4,
    }  # fmt: skip
    for name, section in details.items():
        if name != "routes":
            with Image.open(root / "evaluation" / section["sheet"]) as sheet:
                assert sheet.size == (len(section["columns"]) * 32, len(section["rows"]) * 32)
    with Image.open(root / "evaluation" / "reconstruction.png") as sheet:
        third = torch.from_numpy(render([sample_scene(WORLD, "heldout", 2)], 32))[0]
        assert list(sheet.crop((0, 64, 32, 96)).get_flattened_data()) == [
            tuple(p) for p in third.flatten(0, 1).tolist()
        ]
    for row in details["routes"]["rows"]:
        assert len(row["tokens"]) == len(row["weights"]) and len(row["layers"]) == len(row["weights"][0])
    again = dict(scores)
    assert evaluate.evaluate(root, evaluate.QUICK) == again


def test_phases_that_are_not_there_are_left_out_and_named(root, tmp_path, caplog):
    (tmp_path / "data").symlink_to(root / "data")
    with pytest.raises(UserError, match="holds no run directory"):
        evaluate.evaluate(tmp_path)
    (tmp_path / "align_connector").mkdir(parents=True)
    (tmp_path / "align_connector" / "recipe.yaml").touch()
    with pytest.raises(UserError, match="holds no trained run of bootstrap_mllm, tokenizer_encoder or instruct"):
        evaluate.evaluate(tmp_path)
    shutil.copytree(root / "tokenizer_encoder", tmp_path / "tokenizer_encoder")
    shutil.copytree(root / "tokenizer_encoder", tmp_path / "tokenizer_encoder,encoder=frozen")
    shutil.copytree(root / "parts", tmp_path / "parts")
    with caplog.at_level("INFO"):
        scores = evaluate.evaluate(tmp_path, evaluate.Counts(scenes=4))
    assert "skipped questions, which needs bootstrap_mllm" in caplog.text
    assert "skipped generation, which needs instruct" in caplog.text
    assert scores["tokenizer.psnr_frozen_encoder"] == scores["tokenizer.psnr"]
    details = json.loads((tmp_path / "evaluation" / "details.json").read_text())
    assert list(details) == ["reconstruction"]
    assert details["reconstruction"]["columns"] == ["source", "frozen_encoder", "ours"]
    assert len(details["reconstruction"]["rows"][0]["psnr"]) == 2


def test_a_folder_without_a_world_is_refused(root, tmp_path):
    shutil.copytree(root / "tokenizer_encoder", tmp_path / "tokenizer_encoder")
    (tmp_path / "data").mkdir()
    with pytest.raises(
        UserError, match=r"world\.json: no such file; expected shards that `spar-scale data make` wrote"
    ):
        evaluate.evaluate(tmp_path)
    (tmp_path / "data" / "world.json").write_text("{}")
    with pytest.raises(UserError, match=r"world\.json: not the settings of a world"):
        evaluate.evaluate(tmp_path)


@pytest.fixture
def untrained(data, tmp_path, monkeypatch):
    """A root with a phase that looks trained; its only measurement fails the test."""
    (tmp_path / "data").symlink_to(data)
    (tmp_path / "instruct" / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "instruct" / "recipe.yaml").touch()
    measured = {"editing": (("instruct",), lambda trained: pytest.fail("something was measured"))}
    monkeypatch.setattr(evaluate, "MEASUREMENTS", measured)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("evaluation", Path.touch, "a file or device has the name of this directory"),
        ("evaluation", os.mkfifo, "a file or device has the name of this directory"),
        ("evaluation/details.json", Path.mkdir, "is a directory and is not replaced"),
        ("evaluation/editing.png", os.mkfifo, "is a FIFO and is not replaced"),
        ("scores.json", Path.mkdir, "is a directory and is not replaced"),
        ("scores.json", os.mkfifo, "is a FIFO and is not replaced"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_measured(untrained, name, make, message):
    if "/" in name:
        (untrained / "evaluation").mkdir()
    make(untrained / name)
    with pytest.raises(UserError) as refusal:
        evaluate.evaluate(untrained)
    assert str(refusal.value).startswith(f"{untrained / name}: {message}")


@pytest.mark.parametrize("content", ["", "[1]", '{"vqa.after": "0.8"}', '{"core_seconds.data": null}', "\xff"])
def test_damaged_scores_are_refused_before_anything_is_measured(untrained, content):
    (untrained / "scores.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError) as refusal:
        evaluate.evaluate(untrained)
    message = str(refusal.value)
    assert message.startswith(f"{untrained}/scores.json: ") and "\n" not in message
    assert message.endswith(f"; remove it and run `spar-scale evaluate {untrained}` to write a new one")


@pytest.mark.parametrize("name", ["file", "fifo", "file/below", "/dev/null"])
def test_commands_refuse_an_out_that_is_no_directory_before_anything_is_trained(name, tmp_path, monkeypatch):
    for module in (ablation, demo, parity):
        monkeypatch.setattr(module, "import_before_forks", lambda **_: pytest.fail("work has begun"))
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    recipe = Path(__file__).parents[2] / "recipes" / "smoke" / "bootstrap_autoencoder.yaml"
    message = f"^--out: {tmp_path / name}: a file or device has the name of this directory; give another directory$"
    with pytest.raises(UserError, match=message):
        ablation.ablate(tmp_path / name, "smoke", [0])
    with pytest.raises(UserError, match=message):
        parity.parity(recipe, [], "dp2-z1", parity.Runs(), tmp_path / name)
    with pytest.raises(UserError, match=message):
        demo.run(tmp_path / name, "smoke", 0)
    assert sorted(os.listdir(tmp_path)) == ["fifo", "file"]


def test_an_ablation_that_cannot_be_written_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "import_before_forks", lambda **_: pytest.fail("work has begun"))
    (tmp_path / "ablation.json").mkdir()
    with pytest.raises(UserError, match=f"^{tmp_path}/ablation.json: is a directory and is not replaced"):
        ablation.ablate(tmp_path, "smoke", [0])


@pytest.mark.parametrize("content", ["", "[]", '{"psnr": "30"}', '{"psnr": null}'])
def test_damaged_values_of_a_row_are_refused_with_the_folder_to_remove(content, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "import_before_forks", lambda **_: None)
    monkeypatch.setattr(ablation, "run_steps", lambda steps, jobs: None)  # all is done
    monkeypatch.setattr(ablation.Chain, "needed", lambda chain, phase, switches: [Step(phase, chain.out / phase, str)])
    measured = tmp_path / "seed-0" / "measured" / "tokenizer_encoder"
    measured.mkdir(parents=True)
    (measured / "values.json").write_text(content)
    with pytest.raises(UserError) as refusal:
        ablation.ablate(tmp_path, "smoke", [0], ["tokenizer"])
    message = str(refusal.value)
    assert message.startswith(f"{measured}/values.json: ") and "\n" not in message
    assert message.endswith(f"; remove {measured} and run the same command again")
