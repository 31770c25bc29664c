"""The commands that use a trained run: what they draw and write, what they refuse and how."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ready_runs import make_run
from tiny_parts import make_parts

from spar_scale.cli import main
from spar_scale.inference import commands

KINDS = [("align", "joint"), ("align", "connector"), ("bootstrap", "diffusion"), ("bootstrap", "mllm")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    parts = make_parts(folder / "parts")
    return {f"{stage}_{phase}": str(make_run(folder, stage, phase, parts)) for stage, phase in KINDS}


@pytest.fixture
def photograph(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photograph.jpg")
    return tmp_path / "photograph.jpg"


def said(capsys, *words):
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def refused(capsys, *words):
    assert main([str(word) for word in words]) == 2
    return capsys.readouterr().err


def size_of(path):
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return picture.size


@pytest.mark.parametrize("kind", ["align_joint", "align_connector", "bootstrap_diffusion"])
def test_generate_says_what_it_drew_from_what(runs, kind, tmp_path, capsys):
    out = tmp_path / "new" / "picture.png"
    lines = said(capsys, "generate", runs[kind], "A red  circle.", "-o", out, "--steps", 2).splitlines()
    assert lines[0].startswith(f"the average of {runs[kind]}/checkpoints/step-00000001, preset 'tiny', latent scale ")
    assert lines[1:] == ["draw : a red circle", f"{out}: seed 0, 2 steps, guidance 2.5, flow shift 1"]
    assert size_of(out) == (32, 32) and list(out.parent.iterdir()) == [out]


def test_the_same_seed_gives_the_same_bytes_and_another_another_picture(runs, tmp_path, capsys):
    def draw(name, *options):
        said(capsys, "generate", runs["align_joint"], "a red circle", "-o", tmp_path / name, "--steps", 2, *options)
        return (tmp_path / name).read_bytes()

    first = draw("a.png")
    assert draw("b.png", "--seed", 0) == first
    assert draw("c.png", "--seed", 1) != first
    assert draw("d.png", "--guidance", 6) != first
    assert "seeds 0 to 8" in said(
        capsys, "generate", runs["align_joint"], "a red circle", "-o", tmp_path / "e.png", "--steps", 2, "--number", 9
    )
    together = np.array(Image.open(tmp_path / "e.png"), dtype=int)
    assert together.shape == (66, 270, 3)
    for name, left in (("a.png", 0), ("c.png", 34)):
        alone = np.array(Image.open(tmp_path / name), dtype=int)
        assert abs(together[:32, left : left + 32] - alone).max() <= 1  # rounding


def test_edit_reads_the_middle_square_of_a_picture_of_any_size(runs, photograph, tmp_path, capsys):
    def changed(image, name):
        out = tmp_path / name
        line = said(capsys, "edit", runs["align_joint"], image, "make the circle blue.", "-o", out, "--steps", 2)
        assert f"{image}, its middle square at 32 pixels; edit : make the circle blue\n" in line
        assert size_of(out) == (32, 32)
        return out.read_bytes()

    first, picture = changed(photograph, "a.png"), np.array(Image.open(photograph))
    for name, columns, same in (("sides", [*range(10), *range(60, 70)], True), ("middle", range(30, 40), False)):
        painted = picture.copy()
        painted[:, list(columns)] = 0
        Image.fromarray(painted).save(tmp_path / f"{name}.png")
        assert (changed(tmp_path / f"{name}.png", "b.png") == first) == same


def test_a_photograph_is_read_upright(runs, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    upright, orientation = Image.fromarray(pixels), Image.Exif()
    orientation[0x0112] = 6  # turned by 90 degrees
    upright.save(tmp_path / "upright.png")
    upright.rotate(90).save(tmp_path / "turned.png", exif=orientation)
    for name in ("upright", "turned"):
        said(capsys, "reconstruct", runs["align_joint"], tmp_path / f"{name}.png", "-o", tmp_path / f"{name}.out.png")
    assert (tmp_path / "upright.out.png").read_bytes() == (tmp_path / "turned.out.png").read_bytes()


def test_routes_prints_its_table_and_draws(runs, photograph, tmp_path, capsys):
    out = tmp_path / "routes.png"
    words = said(capsys, "routes", runs["align_connector"], "a red circle", "-o", out).splitlines()
    rows = {line[:30].strip(): [float(number) for number in line[30:].split()] for line in words[2:-1]}
    assert list(rows)[:6] == ["<bos>", "draw", ":", "a", "red", "circle"] and "queries (16, mean)" in rows
    assert all(sum(row) == pytest.approx(1, abs=0.003) for row in rows.values())
    plain = size_of(out)
    line = said(
        capsys, "routes", runs["align_joint"], "make the circle blue", "--image", photograph, "-o", out
    )  # fmt: skip
    assert "picture, not used (16, mean)" in line and size_of(out)[1] > plain[1]


@pytest.mark.parametrize("kind", ["align_joint", "align_connector", "bootstrap_diffusion"])
def test_reconstruct_takes_the_runs_tokenizer(runs, kind, photograph, tmp_path, capsys):
    line = said(capsys, "reconstruct", runs[kind], photograph, "-o", tmp_path / "out.png")
    assert f"{photograph} through the average of {runs[kind]}/checkpoints/step-00000001" in line and " dB" in line
    assert size_of(tmp_path / "out.png") == (70, 40)


@pytest.mark.parametrize("kind", ["align_joint", "bootstrap_mllm"])
def test_ask_takes_a_language_model_alone_or_within_spar(runs, kind, photograph, capsys):
    answer, who = said(capsys, "ask", runs[kind], photograph, "What color is the circle?").splitlines()
    assert answer == answer.strip() and len(answer.split()) <= 16
    assert who.startswith(f"(the average of {runs[kind]}/checkpoints/step-00000001, preset 'tiny'")


WRONG_KIND = [
    ("edit", "align_connector", r"'connector', which edits no pictures; a run of stage 'align', phase 'joint', or "),
    (
        "generate",
        "bootstrap_mllm",
        "which draws no pictures; a run of stage 'bootstrap', phase 'diffusion', or ",
    ),
    (
        "routes",
        "bootstrap_diffusion",
        "which routes no tokens; a run of stage 'align', phase 'connector' or 'joint', or ",
    ),
    (
        "ask",
        "align_connector",
        "which answers no questions; a run of stage 'bootstrap', phase 'mllm', or ",
    ),
    (
        "reconstruct",
        "bootstrap_mllm",
        "or stage 'tokenizer', phase 'init', 'decoder', 'encoder' or 'high_resolution', or ",
    ),
]


@pytest.mark.parametrize(("command", "kind", "message"), WRONG_KIND)
def test_a_run_of_the_wrong_kind_is_refused_with_those_that_fit(
    runs, photograph, tmp_path, capsys, command, kind, message
):
    picture = [] if command in ("generate", "routes") else [photograph]
    words = [] if command == "reconstruct" else ["a red circle"]
    target = [] if command == "ask" else ["-o", tmp_path / "out.png"]
    error = refused(capsys, command, runs[kind], *picture, *words, *target)
    assert message in error and error.endswith(" is needed\n") and error.count("\n") == 1
    assert not (tmp_path / "out.png").exists()


def test_routes_of_a_picture_need_a_run_that_edits(runs, photograph, tmp_path, capsys):
    error = refused(
        capsys, "routes", runs["align_connector"], "a circle", "--image", photograph, "-o", tmp_path / "out.png"
    )
    assert "which edits no pictures" in error


PROMPTS = {
    "a redd circle in colour": "unknown words: 'redd'; did you mean 'red'?, 'colour'; did you mean 'color'?; known",
    "a <img> circle": "unknown words: '<img>'",
    "": "the prompt is empty",
    " ., ": "the prompt is empty",
    "red " * 120: "the prompt has 124 tokens; preset 'tiny' takes up to 32 before the 16 that follow",
}


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: prompt[:12])
def test_a_prompt_that_cannot_be_read_is_refused(runs, prompt, tmp_path, capsys):
    assert PROMPTS[prompt] in refused(capsys, "generate", runs["align_joint"], prompt, "-o", tmp_path / "out.png")
    assert PROMPTS[prompt] in refused(capsys, "routes", runs["align_joint"], prompt, "-o", tmp_path / "out.png")
    assert not list(tmp_path.iterdir())


def test_a_long_question_is_refused(runs, photograph, capsys):
    error = refused(capsys, "ask", runs["align_joint"], photograph, "red " * 100)
    assert "the prompt has 124 tokens; preset 'tiny' takes up to 48 before the 16 that follow" in error


def test_what_was_read_is_never_written_over(runs, photograph, tmp_path, capsys):
    before = photograph.read_bytes()
    (tmp_path / "link.png").symlink_to(photograph)
    for out in (photograph, tmp_path / "link.png"):
        for command, words in (("edit", ["a circle"]), ("reconstruct", [])):
            error = refused(capsys, command, runs["align_joint"], photograph, *words, "-o", out)
            assert "is the input picture; write to another file" in error
    assert photograph.read_bytes() == before


TARGETS = {
    "a directory": ("", "is a directory and is not replaced"),
    "a FIFO": ("fifo.png", "is a FIFO and is not replaced"),
    "a device": ("/dev/null", "is a device and is not replaced"),
    "below a file": ("file/out.png", "a file or device has the name of this directory"),
    "no extension": ("out", "found no extension, must be one of .png, .jpg, .jpeg, .webp"),
    "another format": ("out.gif", "found the extension '.gif', must be one of .png, .jpg, .jpeg, .webp"),
    "a long name": ("a" * 252 + ".png", "cannot be written (File name too long)"),
    "below a long name": ("a" * 256 + "/out.png", "cannot be written (File name too long)"),
    "a loop of links": ("loop.png", "cannot be written (Too many levels of symbolic links)"),
    "a directory without new files": ("/proc/self/out.png", "cannot be written ("),
}


@pytest.mark.parametrize(
    ("command", "case"),
    [*(("generate", case) for case in TARGETS), ("edit", "a FIFO"), ("routes", "a FIFO"), ("reconstruct", "a FIFO")],
)
def test_a_target_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    runs, command, case, photograph, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(commands, "load_run", lambda *_: pytest.fail("the model was loaded"))
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "file").write_text("kept")
    (tmp_path / "loop.png").symlink_to("loop.png")
    before = sorted(tmp_path.iterdir())
    name, message = TARGETS[case]
    words = {"generate": ["a circle"], "edit": [photograph, "a circle"], "routes": ["a circle"]}
    given = words.get(command, [photograph])
    error = refused(capsys, command, runs["align_joint"], *given, "-o", tmp_path / name)
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "fifo.png").is_fifo() and (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    ("name", "format"),
    [("a.png", "PNG"), ("a.jpg", "JPEG"), ("a.jpeg", "JPEG"), ("a.webp", "WEBP"), ("A.PNG", "PNG"), ("A.JPG", "JPEG")],
)
def test_the_format_of_a_picture_follows_the_extension(runs, name, format, photograph, tmp_path, capsys):
    said(capsys, "reconstruct", runs["align_joint"], photograph, "-o", tmp_path / name)
    with Image.open(tmp_path / name) as picture:
        assert (picture.format, picture.size) == (format, (70, 40))


def test_what_is_no_picture_is_refused(runs, photograph, tmp_path, capsys):
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGB", (40, 1)).save(tmp_path / "thin.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.jpg").write_bytes(photograph.read_bytes()[:400])
    messages = {
        "deep.png": "image mode I;16; only 8-bit images are read",
        "thin.png": "40x1 pixels; both edges need at least 2",
        "text.png": "not an image; PNG, JPEG or WebP is needed",
        "cut.jpg": "a readable image is needed",
        "none.png": "No such file or directory; a readable image is needed",
    }
    for name, message in messages.items():
        error = refused(capsys, "edit", runs["align_joint"], tmp_path / name, "a circle", "-o", tmp_path / "out.png")
        assert error.startswith(f"error: {tmp_path / name}: ") and message in error
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [("--seed", "-1"), ("--steps", "0"), ("--number", "0"), ("--guidance", "nan"), ("--guidance", "-1")],
)
def test_numbers_that_mean_nothing_are_refused_by_the_parser(option, value, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["generate", "run", "a circle", "-o", "out.png", option, value])
    assert stop.value.code == 2 and f"found {value}, must be" in capsys.readouterr().err


def test_more_steps_than_the_flow_has_are_refused(runs, tmp_path, capsys):
    error = refused(
        capsys, "generate", runs["align_joint"], "a circle", "-o", tmp_path / "out.png", "--steps", 1001
    )  # fmt: skip
    assert "--steps: found 1001; the flow has 1000" in error


def test_a_run_without_a_checkpoint_is_refused(tmp_path, runs, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "recipe.yaml").write_bytes((Path(runs["align_joint"]) / "recipe.yaml").read_bytes())
    assert "holds no checkpoint yet" in refused(capsys, "generate", bare, "a circle", "-o", tmp_path / "out.png")
    assert "holds no recipe.yaml" in refused(capsys, "generate", tmp_path, "a circle", "-o", tmp_path / "out.png")
