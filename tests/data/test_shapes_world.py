"""The miniature world: reproducible to the byte, and everything it says is true of what it draws."""

from __future__ import annotations

import json
import re
import resource
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from parallel.errors import UserError
from spar_scale.data.commands import make, show
from spar_scale.data.order import draw_generator
from spar_scale.data.shapes_language import VOCABULARY, captions, choose_caption, instruction, questions
from spar_scale.data.shapes_render import RGB, render
from spar_scale.data.shapes_world import COLORS, SHAPES, Scene, World, is_unseen, sample_edit, sample_scene
from spar_scale.data.shards import make_world
from spar_scale.data.storage import read_member
from spar_scale.data.tar_index import read_index

WORLD = World(seed=11)
SCENES = [sample_scene(WORLD, "scenes", number) for number in range(400)]
EDITS = [sample_edit(WORLD, "edits", number) for number in range(200)]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def color_of(image: np.ndarray, x: float, y: float) -> str:
    """Return the colour name of a pixel; "ground" where it is grey."""
    pixel = image[int(np.clip(y, 0, len(image) - 1)), int(np.clip(x, 0, len(image) - 1))].astype(float)
    if pixel.max() - pixel.min() < 40:
        return "ground"
    return COLORS[int(np.abs(RGB - pixel).sum(1).argmin())]


def test_the_same_settings_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        make_world(World(scenes=12, heldout=4, edits=6, heldout_edits=3, per_shard=5), tmp_path / name)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    make_world(World(scenes=12, heldout=4, edits=6, per_shard=5, seed=1), tmp_path / "c")
    assert files(tmp_path / "a")["scenes-00000.tar"] != files(tmp_path / "c")["scenes-00000.tar"]


def test_a_scene_does_not_depend_on_how_many_are_made_or_their_texture():
    assert sample_scene(World(scenes=5, per_shard=2), "scenes", 3) == sample_scene(World(), "scenes", 3)
    plain, textured = (sample_scene(World(texture=t), "scenes", 3) for t in (False, True))
    assert plain.objects == textured.objects and plain.ground.level == textured.ground.level
    assert sample_scene(WORLD, "heldout", 3) != SCENES[3]


@pytest.mark.parametrize("size", [32, 96])
def test_every_object_is_drawn_in_its_colour_and_shape(size):
    scenes = [sample_scene(World(size=size, seed=11, shapes=SHAPES), "scenes", number) for number in range(200)]
    for scene, image in zip(scenes, render(scenes, size), strict=True):
        for o in scene.objects:
            assert color_of(image, o.x, o.y) == o.color
        if scene.kind == "single" and size > 64:
            (o,) = scene.objects
            points = [(0.78, 0.78), (0.78, 0.0), (0.0, 0.78), (0.45, 0.45)]  # upper corner, side, top, between them
            found = [color_of(image, o.x + x * o.radius, o.y - y * o.radius) == o.color for x, y in points]
            filled = {
                "circle": [False, True, True, True],
                "square": [True, True, True, True],
                "triangle": [False, False, True, False],
                "cross": [False, True, True, False],
                "diamond": [False, True, True, True],
            }
            assert found == filled[o.shape]


def test_captions_are_true_and_in_the_vocabulary():
    middle = WORLD.size / 2
    for scene in SCENES:
        for caption in captions(scene):
            assert set(caption.split()) <= set(VOCABULARY)
            assert true_caption(caption, scene, middle), (caption, scene)


def true_caption(caption: str, scene: Scene, middle: float) -> bool:
    """Judge a caption from the objects' coordinates alone."""
    words = caption.split()
    looks = sorted((o.color, o.shape) for o in scene.objects)
    if words[0] in ("two", "three"):
        return looks == [(words[1], words[2][:-1])] * {"two": 2, "three": 3}[words[0]]
    named = [(words[i], words[i + 1]) for i in range(len(words) - 1) if words[i] in COLORS]
    if sorted(named) != looks:
        return False
    o = {(o.color, o.shape): o for o in scene.objects}
    a = o[named[0]]
    if len(named) == 1:
        dx, dy = a.x - middle, a.y - middle
        places = {"left": dx < -4, "right": dx > 4, "top": dy < -4, "bottom": dy > 4}
        places["center"] = not any(places.values())
        return len(words) == 3 or (places[words[-1]] and sum(places.values()) == 1)
    b = o[named[1]]
    relations = {"left": b.x - a.x, "right": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y, "and": 99.0}
    return relations[words[3]] > 8


def test_questions_are_answered_truly_and_every_type_occurs():
    types = Counter()
    exists = Counter()
    for number, scene in enumerate(SCENES):
        looks = {(o.color, o.shape) for o in scene.objects}
        for asked in questions(scene, WORLD, draw_generator(0, "words", number)):
            words, answer = asked["question"].split(), asked["answer"]
            assert {*words, answer} <= set(VOCABULARY)
            types[asked["type"]] += 1
            match asked["type"]:
                case "color":
                    assert [o.color for o in scene.objects if o.shape == words[-2]] == [answer]
                case "shape":
                    assert [o.shape for o in scene.objects if o.color == words[-3]] == [answer]
                case "count":
                    assert ("zero", "one", "two", "three")[len(scene.objects)] == answer
                case "where":
                    (o,) = [o for o in scene.objects if (o.color, o.shape) == (words[-3], words[-2])]
                    assert true_caption(
                        f"a {o.color} {o.shape} on the {answer}", Scene("single", (o,), scene.ground), 16
                    )
                case "exist":
                    assert ((words[-3], words[-2]) in looks) == (answer == "yes")
                    exists[answer] += 1
    assert types.keys() == {"color", "shape", "count", "where", "exist"} and min(types.values()) >= 200
    assert exists["yes"] == exists["no"]


def test_kinds_and_captions_come_in_their_shares():
    kinds = Counter(scene.kind for scene in SCENES)
    assert abs(kinds["single"] - 160) < 40 and abs(kinds["two"] - 200) < 40 and abs(kinds["count"] - 40) < 25
    singles = [s for s in SCENES if s.kind == "single"]
    placed = sum("the" in choose_caption(s, draw_generator(0, "w", n)).split() for n, s in enumerate(singles))
    assert 0.5 < placed / len(singles) < 0.82
    assert {o.shape for s in SCENES for o in s.objects} == set(SHAPES[:3])
    assert {o.color for s in SCENES for o in s.objects} == set(COLORS)
    assert len(VOCABULARY) == len(set(VOCABULARY)) == 63


def content(scene: Scene) -> tuple[object, ...]:
    looks = tuple(sorted((o.color, o.shape) for o in scene.objects))
    return (*looks, scene.objects[0].zone) if scene.kind == "single" else looks


def test_held_out_data_show_contents_that_training_never_shows():
    world = World(seed=11, unseen=0.2)
    trained = [sample_scene(world, "scenes", number) for number in range(1500)]
    edits = [sample_edit(world, "edits", number) for number in range(300)]
    trained += [side for edit in edits for side in (edit.source, edit.target)]
    held_out = [sample_scene(world, "heldout", number) for number in range(600)]
    seen, new = ({content(s) for s in held_out if is_unseen(world, s) is unseen} for unseen in (False, True))
    assert not {content(scene) for scene in trained} & new and not seen & new
    assert 0.12 < len(new) / len(seen | new) < 0.28
    new_captions = {text for s in held_out if is_unseen(world, s) for text in captions(s) if len(text.split()) > 3}
    assert not new_captions & {text for s in trained for text in captions(s)}
    assert {s.kind for s in held_out if is_unseen(world, s)} == {"single", "two", "count"}
    free = [sample_edit(world, "test-edits", number) for number in range(60)]
    assert any(is_unseen(world, edit.target) for edit in free)


def test_nothing_is_kept_away_where_the_share_is_0_and_kinds_keep_their_shares_where_it_is_not():
    free, half = World(seed=11, unseen=0), World(seed=11, unseen=0.5)
    assert not any(is_unseen(free, scene) for scene in SCENES)
    kinds = [[sample_scene(w, "scenes", n).kind for n in range(50)] for w in (free, half)]
    assert kinds[0] == kinds[1]
    assert [sample_scene(half, "heldout", n) for n in range(50)] == [
        sample_scene(free, "heldout", n) for n in range(50)
    ]


def test_a_look_that_is_kept_away_is_neither_shown_nor_named_in_training():
    world = World(seed=3, shapes=SHAPES, unseen_looks=("red cross", "blue circle"))
    scenes = [sample_scene(world, "scenes", number) for number in range(400)]
    edits = [sample_edit(world, "edits", number) for number in range(200)]
    shown = scenes + [side for edit in edits for side in (edit.source, edit.target)]
    looks = {f"{o.color} {o.shape}" for scene in shown for o in scene.objects}
    assert {*looks, *world.unseen_looks} == {f"{c} {s}" for c in COLORS for s in SHAPES}
    assert not looks & set(world.unseen_looks)
    said = [entry["question"] for n, s in enumerate(scenes) for entry in questions(s, world, draw_generator(0, "w", n))]
    said += [text for scene in scenes for text in captions(scene)]
    assert not any(look in text for look in world.unseen_looks for text in said)
    assert {*" ".join(said).split()} <= set(VOCABULARY) and any("crosses" in text for text in said)
    held_out = [sample_scene(world, "heldout", number) for number in range(400)]
    assert {f"{o.color} {o.shape}" for scene in held_out for o in scene.objects} >= set(world.unseen_looks)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"shapes": ["circle", "square", "crss"]}, "'crss' is not a shape; did you mean 'cross'?"),
        ({"shapes": ["circle", "circle", "square"]}, "a shape is listed twice"),
        ({"shapes": ["circle", "square"]}, "at least 3 items"),
        ({"unseen_looks": ["red cross"]}, "'red cross' is not a look of this world"),
        ({"unseen_looks": [f"{c} {s}" for c in COLORS for s in SHAPES[:2]]}, "12 of 18 looks; at most half"),
        ({"unseen": 0.6}, "less than or equal to 0.5"),
    ],
)
def test_shapes_and_looks_that_cannot_be_are_refused(given, message):
    with pytest.raises(ValidationError, match=re.escape(message)):
        World.model_validate(given)


def test_an_edit_changes_what_it_names_and_nothing_else():
    inputs, outputs = (render([getattr(e, side) for e in EDITS], 32) for side in ("source", "target"))
    y, x = np.mgrid[:32, :32] + 0.5
    for edit, before, after in zip(EDITS, inputs, outputs, strict=True):
        o = edit.subject
        near = np.maximum(np.abs(x - o.x), np.abs(y - o.y)) < o.radius + 1.5
        assert np.array_equal(before[~near], after[~near])
        assert not np.array_equal(before, after)
        kept = [o for o in edit.source.objects if o != edit.subject]
        expected = [o for o in (edit.result,) if o is not None] + kept
        key = lambda o: (o.x, o.y)  # noqa: E731
        assert sorted(edit.target.objects, key=key) == sorted(expected, key=key)
    assert set(Counter(e.kind for e in EDITS)) == {"color", "shape", "remove", "add"}


def test_instructions_name_their_subject_without_ambiguity():
    for number, edit in enumerate(EDITS):
        text = instruction(edit, draw_generator(0, "words", number))
        words = text.split()
        assert set(words) <= set(VOCABULARY)
        if edit.kind == "add":
            assert text == f"add a {edit.subject.color} {edit.subject.shape} on the {edit.subject.zone}"
            continue
        named = words[words.index("the") + 1]
        matching = [
            o for o in edit.source.objects if named == o.shape or (named == o.color and words[3:4] == [o.shape])
        ]
        assert matching == [edit.subject], text
        if edit.result is not None:
            assert words[-1] == (edit.result.color if edit.kind == "color" else edit.result.shape)


def test_texture_lays_stripes_on_the_ground_only():
    plain, textured = (render([sample_scene(World(texture=t), "scenes", 0)], 32)[0] for t in (False, True))
    o = sample_scene(World(), "scenes", 0).objects[0]
    assert color_of(plain, o.x, o.y) == color_of(textured, o.x, o.y) == o.color
    assert np.abs(plain[:4].astype(float) - textured[:4]).max() > 10


def test_shards_hold_what_they_say(tiny_world):
    shard = str(tiny_world / "scenes-00003.tar")
    index = read_index(shard)
    assert len(index) == 15 and index.keys[0] == "scenes-00000075"
    assert sorted(index.extensions) == ["json", "png", "txt"]
    table = index.members(2)
    said = json.loads(read_member(shard, *table["json"]))
    assert read_member(shard, *table["txt"]).decode() in said["captions"]
    scene = sample_scene(World(seed=3), "scenes", 77)
    assert said["scene"] == json.loads(json.dumps(scene.as_json())) and said["questions"]
    edits = read_index(str(tiny_world / "edits-00000.tar"))
    assert sorted(edits.extensions) == ["input.png", "json", "output.png", "txt"]


def test_held_out_edits_lie_apart_and_say_what_a_judge_needs(tmp_path):
    world = World(scenes=0, heldout=3, edits=3, heldout_edits=3, seed=3)
    make_world(world, tmp_path)
    assert [path.name for path in sorted(tmp_path.glob("*edits-*.tar"))] == ["edits-00000.tar", "test-edits-00000.tar"]
    shard = str(tmp_path / "test-edits-00000.tar")
    edit, index = sample_edit(world, "test-edits", 1), read_index(shard)
    assert index.keys[1] == "test-edits-00000001"
    said = json.loads(read_member(shard, *index.members(1)["json"]))
    sides = {"input_scene": edit.source.as_json(), "output_scene": edit.target.as_json()}
    assert said["type"] == edit.kind and {name: said[name] for name in sides} == sides
    trained = read_index(str(tmp_path / "edits-00000.tar"))
    assert trained.keys[1] == "edits-00000001"


def test_making_the_same_world_again_does_nothing(tmp_path, caplog):
    world = World(scenes=4, heldout=2, edits=2, unseen_looks=("red circle",))
    make(world, tmp_path / "w")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "w").iterdir()}
    with caplog.at_level("INFO"):
        make(world, tmp_path / "w")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "w").iterdir()} == times
    assert "this world already exists (3 shards)" in caplog.text


def test_an_interrupted_world_is_completed(tmp_path):
    world = World(scenes=9, heldout=2, edits=2, per_shard=3)
    make_world(world, tmp_path / "w")
    whole = files(tmp_path / "w")
    settings = tmp_path / "w" / "world.json"
    settings.write_text(settings.read_text().replace('"complete": true', '"complete": false'))
    (tmp_path / "w" / "scenes-00001.tar").unlink()
    (tmp_path / "w" / "scenes-00002.tar.index.npz").unlink()
    (tmp_path / "w" / "edits-00000.tar").write_bytes(b"cut short")
    make_world(world, tmp_path / "w")
    assert files(tmp_path / "w") == whole


def test_a_folder_with_another_world_is_refused(tmp_path):
    world = World(scenes=4, heldout=0, edits=0)
    make_world(world, tmp_path / "w")
    before = files(tmp_path / "w")
    with pytest.raises(UserError) as caught:
        make_world(world.model_copy(update={"seed": 5, "size": 48}), tmp_path / "w")
    assert str(caught.value) == (
        f"{tmp_path}/w: holds a world made with other settings"
        " (seed: found 0, expected 5, size: found 32, expected 48); choose another folder, or delete that one"
    )
    assert files(tmp_path / "w") == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("scenes-00000.tar", b"mine", "holds scenes-00000.tar but no world.json with its settings"),
        ("world.json", b"{", "world.json: not the settings of a world"),
        ("world.json", b"[1]", "world.json: not the settings of a world"),
    ],
)
def test_strange_folders_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        make_world(World(scenes=1, heldout=0, edits=0), tmp_path)
    assert files(tmp_path) == {name: content}


def test_a_full_disk_is_said_and_the_world_can_be_completed(tmp_path):
    world = World(scenes=6, heldout=0, edits=0, per_shard=3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(UserError) as caught:
            make_world(world, tmp_path / "w")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value) == f"{tmp_path}/w/scenes-00000.tar: cannot be written (File too large)"
    assert list(files(tmp_path / "w")) == ["world.json"]
    assert len(make_world(world, tmp_path / "w")) == 2


def test_a_file_instead_of_a_folder_is_refused(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(UserError, match="is a file, expected a folder for the shards"):
        make_world(World(scenes=1), tmp_path / "x")


def test_settings_are_strict():
    for given in ({"scene": 3}, {"size": 8}, {"per_shard": 0}, {"scenes": -1}):
        with pytest.raises(ValidationError):
            World.model_validate(given)
    with pytest.raises(UserError, match="at least one sample"):
        make_world(World(scenes=0, heldout=0, edits=0), Path("nowhere"))


def test_show_prints_texts_and_draws_a_sheet(tiny_world, tmp_path, capsys):
    show([str(tiny_world / "edits-00000.tar")], 3, tmp_path / "new" / "sheet.png")
    said = capsys.readouterr().out
    assert "25 samples with input.png, json, output.png, txt" in said
    assert said.count("  edits-0000000") == 3 and "6 images" in said
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        assert sheet.size == (8 * 132, 156) and len(sheet.getcolors(100000) or []) > 20
    with pytest.raises(UserError, match="count is -1"):
        show([str(tiny_world / "edits-00000.tar")], -1, None)


def test_rendering_follows_size():
    scene = SCENES[0]
    double = Scene(
        scene.kind, tuple(replace(o, x=o.x * 2, y=o.y * 2, radius=o.radius * 2) for o in scene.objects), scene.ground
    )
    small, large = render([scene], 32)[0], render([double], 64)[0]
    shrunk = large.reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(shrunk - small).mean() < 2
