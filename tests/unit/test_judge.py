"""The judge: what the world draws is found, and each way of drawing something else fails."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spar_scale.data.shapes_render import RGB, render
from spar_scale.data.shapes_world import COLORS, SHAPES, Ground, Object, Scene, World, sample_scene
from spar_scale.evaluation.detector import components, detect
from spar_scale.evaluation.judge import fulfils, shows_looks, shows_scene, zone
from spar_scale.evaluation.requests import Request

LIGHT = Ground(0.9, 0.02, 1.0)
LEFT, RIGHT = Object("circle", "red", 6.0, 8.0, 16.0, "left"), Object("square", "blue", 6.0, 24.0, 16.0, "right")
PAIR = Request("relation", "a red circle left of a blue square", ("red circle", "blue square"), side="left")


def pictures(*scenes: tuple[Object, ...], size: int = 32) -> torch.Tensor:
    drawn = render([Scene("two", objects, LIGHT) for objects in scenes], size)
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255


def found(*objects: Object):
    return detect(pictures(objects))[0]


@pytest.mark.parametrize(("size", "shapes", "share"), [(32, SHAPES[:3], 0.99), (48, SHAPES, 0.98)])
@pytest.mark.parametrize("texture", [False, True])
def test_the_scenes_of_the_world_are_found_as_they_are(size, shapes, share, texture):
    scenes = [sample_scene(World(size=size, shapes=shapes, seed=9, texture=texture), "heldout", n) for n in range(300)]
    images = torch.from_numpy(render(scenes, size)).permute(0, 3, 1, 2).float() / 255
    seen = detect(images, shapes)
    exact = [shows_scene(scene.objects, objects, size) for scene, objects in zip(scenes, seen, strict=True)]
    assert sum(exact) / len(exact) >= share
    single = [(s.objects[0], o[0]) for s, o, right in zip(scenes, seen, exact, strict=True) if right and len(o) == 1]
    assert max(max(abs(o.x - f.x), abs(o.y - f.y)) for o, f in single) < 0.3 * size / 32
    assert all(zone(f, size) == o.zone for o, f in single)


def test_connected_pixels_of_a_colour_are_one_component():
    colors = torch.tensor([[[0, 0, -1, 1], [-1, 0, 1, 1], [0, -1, -1, -1], [0, 0, 0, 0]]])
    labels = components(colors)[0]
    assert (labels == -1).equal(colors[0] == -1)
    assert labels.unique().tolist() == [-1, 5, 7, 15]  # by the largest index; corners do not join
    assert components(torch.cat([colors, colors]))[1].sub(16).clamp(min=-1).equal(labels)


def test_the_right_pair_passes():
    assert fulfils(PAIR, found(LEFT, RIGHT), 32)
    assert shows_scene((RIGHT, LEFT), found(LEFT, RIGHT), 32)


SPOT = Object("circle", "red", 2.0, 16.0, 4.0, None)
WRONG = {
    "an extra object": (LEFT, RIGHT, Object("triangle", "green", 5.0, 16.0, 6.0, None)),
    "an extra spot": (LEFT, RIGHT, SPOT),
    "an object less": (LEFT,),
    "nothing": (),
    "another colour": (LEFT, replace(RIGHT, color="purple")),
    "another shape": (LEFT, replace(RIGHT, shape="triangle")),
    "colours exchanged": (replace(LEFT, color="blue"), replace(RIGHT, color="red")),
    "one as the other": (LEFT, replace(LEFT, x=24.0)),
    "two in one": (replace(LEFT, x=13.0), replace(RIGHT, x=18.0)),
    "a twin that runs into it": (LEFT, replace(LEFT, x=14.0), RIGHT),
}


@pytest.mark.parametrize("objects", WRONG.values(), ids=WRONG)
def test_other_objects_fail(objects):
    assert not fulfils(PAIR, found(*objects), 32)
    assert not shows_looks((LEFT, RIGHT), found(*objects))


@pytest.mark.parametrize("shift", [(-16.0, 0.0), (-8.0, 9.0), (-8.0, -9.0)])
def test_objects_on_another_side_fail(shift):
    moved = replace(RIGHT, x=RIGHT.x + shift[0] - 2, y=RIGHT.y + shift[1])
    other = replace(LEFT, x=24.0) if shift[1] == 0 else LEFT
    seen = found(other, moved)
    assert shows_looks((LEFT, RIGHT), seen) and not fulfils(PAIR, seen, 32)
    assert not shows_scene((LEFT, RIGHT), seen, 32)


@pytest.mark.parametrize(
    ("zone_asked", "x", "y", "passes"),
    [
        ("left", 8, 16, True),
        ("left", 16, 16, False),
        ("left", 8, 7, False),
        ("center", 17, 15, True),
        ("center", 20.5, 16, False),
        ("bottom", 16, 24, True),
        ("top", 16, 24, False),
    ],
)
def test_a_single_object_must_stand_in_its_zone(zone_asked, x, y, passes):
    request = Request("position", "", ("green triangle",), zone=zone_asked)
    assert fulfils(request, found(Object("triangle", "green", 6.0, x, y, None)), 32) is passes


def test_a_number_must_be_right():
    two = Request("count", "", ("red circle",) * 2)
    objects = [replace(LEFT, radius=5.0, x=x, y=y) for x, y in ((8.0, 24.0), (24.0, 24.0), (16.0, 8.0))]
    assert [fulfils(two, found(*objects[:number]), 32) for number in range(4)] == [False, False, True, False]


def test_a_shape_that_none_is_is_an_object_without_a_shape():
    image = pictures(())[0]
    image[:, 10:22, 10:14] = image[:, 18:22, 10:26] = torch.tensor(RGB[COLORS.index("red")] / 255)[:, None, None]
    (seen,) = detect(image[None])[0]
    assert (seen.shape, seen.color) == (None, "red") and seen.as_json()["shape"] is None


def test_an_edit_must_leave_the_rest_in_its_place():
    assert shows_scene((LEFT, RIGHT), found(LEFT, replace(RIGHT, y=19.0)), 32)
    assert not shows_scene((LEFT, RIGHT), found(LEFT, replace(RIGHT, y=22.0)), 32)
    twins = (LEFT, replace(LEFT, x=24.0))
    assert shows_scene(twins, found(*reversed(twins)), 32)
