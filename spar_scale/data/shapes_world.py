"""The miniature world: small captioned scenes of coloured shapes, questions about them, and edits.

The world is easy on purpose: with 32x32 pixels and one to three large objects on a plain background, two CPU cores
learn to draw and describe it in minutes. `texture` adds stripes to the background for a harder world. Scene n is a
function of (seed, purpose, n) alone: it does not depend on the number of scenes or on their division into shards, and
`texture` changes only the background.

Some contents are held out of training, so that evaluation can test new ones. A content is a look (shape and colour) in
a zone, an unordered pair of looks, or a number of one look. Scenes for training are redrawn until their content is not
held out; held-out data have all contents.

Lengths are in pixels of a 32-pixel image and scale with `size`; x grows to the right, y downwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from parallel.errors import nearest
from spar_scale.data.order import draw_generator

SHAPES = ("circle", "square", "triangle", "cross", "diamond")
COLORS = ("red", "green", "blue", "yellow", "purple", "cyan")
ZONES = ("left", "right", "top", "bottom", "center")
EDITS = ("color", "shape", "remove", "add")
TRAINING = ("scenes", "edits")  # the purposes whose scenes never have an unseen content
KINDS = ("single", "two", "count")
KIND_SHARES = (0.46, 0.42, 0.12)

UNIT_SIZE = 32  # the lengths below are pixels of an image with this side
CENTER, EDGE = 16.0, 8.2  # an object's centre is in the middle, or this far from an edge
RADIUS, RADIUS_OF_THREE = (5.4, 6.8), (5.2, 5.8)


class World(BaseModel):
    """Settings of a miniature world: how large, how many, how hard."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(default=32, ge=16, le=1024, description="side of the images in pixels")
    seed: int = Field(default=0, ge=0, description="the same seed gives the same scenes on every machine")
    scenes: int = Field(default=20000, ge=0, description="captioned scenes for training")
    heldout: int = Field(default=1000, ge=0, description="captioned scenes for evaluation, drawn separately")
    edits: int = Field(default=8000, ge=0, description="editing triplets: input, instruction, output")
    heldout_edits: int = Field(default=0, ge=0, description="editing triplets for evaluation")
    per_shard: int = Field(default=2000, ge=1, description="samples per tar")
    texture: bool = Field(default=False, description="stripes on the background")
    shapes: tuple[str, ...] = Field(default=SHAPES[:3], min_length=3, description="the shapes that occur")
    unseen: float = Field(default=0.1, ge=0, le=0.5, description="share of contents that only held-out data have")
    unseen_looks: tuple[str, ...] = Field(default=(), description='looks that only held-out data have, as "red cross"')

    @field_validator("shapes")
    @classmethod
    def _known_shapes(cls, shapes: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [shape for shape in shapes if shape not in SHAPES]:
            raise ValueError(
                f"{unknown[0]!r} is not a shape{nearest(unknown[0], SHAPES)}; there are {', '.join(SHAPES)}"
            )
        if len(set(shapes)) < len(shapes):
            raise ValueError("a shape is listed twice")
        return shapes

    @model_validator(mode="after")
    def _known_looks(self) -> World:
        looks = [f"{color} {shape}" for color in COLORS for shape in self.shapes]
        if unknown := [look for look in self.unseen_looks if look not in looks]:
            raise ValueError(f"unseen_looks: {unknown[0]!r} is not a look of this world{nearest(unknown[0], looks)}")
        if 2 * len(self.unseen_looks) > len(looks):
            raise ValueError(
                f"unseen_looks: {len(self.unseen_looks)} of {len(looks)} looks; at most half can be held out"
            )
        return self


@dataclass(frozen=True)
class Object:
    """A shape in the image: radius and centre in pixels, and its zone (None among three objects)."""

    shape: str
    color: str
    radius: float
    x: float
    y: float
    zone: str | None

    @property
    def look(self) -> str:
        """Colour and shape, as in captions: "red circle"."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Ground:
    """The background: grey level in [0, 1], a linear gradient and, for a textured world, stripes.

    Angles are in radians; `wavelength` is in pixels, `stripes` the amplitude (0: none).
    """

    level: float
    slope: float
    slope_angle: float
    stripes: float = 0.0
    wavelength: float = 1.0
    stripes_angle: float = 0.0
    phase: float = 0.0


@dataclass(frozen=True)
class Scene:
    """One image: its kind, its objects in drawing order, its background.

    `kind` determines the captions: "single" has the object's zone, "two" a relation, "count" the number of equal
    objects.
    """

    kind: Literal["single", "two", "count"]
    objects: tuple[Object, ...]
    ground: Ground

    def as_json(self) -> dict[str, Any]:
        """Return the scene as JSON values."""
        objects = [dict(vars(o)) for o in self.objects]  # dataclasses.asdict copies deeply and takes ten times as long
        return {"kind": self.kind, "objects": objects, "ground": dict(vars(self.ground))}


@dataclass(frozen=True)
class Edit:
    """An editing triplet: the background and the objects that the instruction does not name stay the same."""

    kind: Literal["color", "shape", "remove", "add"]
    source: Scene
    target: Scene
    subject: Object  # the object that is changed or removed, before the edit; or the one that is added
    result: Object | None  # the object after the edit; None if it is removed


def sample_scene(world: World, purpose: str, number: int) -> Scene:
    """Return scene `number` of a purpose ("scenes", "heldout")."""
    draws, ground = draw_generator(world.seed, purpose, number), _ground(world, purpose, number)
    kind = KINDS[int(np.searchsorted(np.cumsum(KIND_SHARES), draws.random() * sum(KIND_SHARES), side="right"))]
    scene = _scene(world, draws, ground, kind)
    while purpose in TRAINING and is_unseen(world, scene):
        scene = _scene(world, draws, ground, kind)
    return scene


def sample_edit(world: World, purpose: str, number: int) -> Edit:
    """Return editing triplet `number` of a purpose ("edits", "test-edits"); the four kinds are equally likely."""
    draws, ground = draw_generator(world.seed, purpose, number), _ground(world, purpose, number)
    kind = EDITS[draws.integers(len(EDITS))]
    edit = _edit(world, draws, ground, kind)
    while purpose in TRAINING and (is_unseen(world, edit.source) or is_unseen(world, edit.target)):
        edit = _edit(world, draws, ground, kind)
    return edit


def is_unseen(world: World, scene: Scene) -> bool:
    """Return whether a scene is held out of training: by its content, or by the look of one of its objects."""
    looks = [o.look for o in scene.objects]
    if scene.kind == "single":
        return is_unseen_content(world, looks, scene.objects[0].zone or "")
    return is_unseen_content(world, looks)


def is_unseen_content(world: World, looks: Sequence[str], zone: str = "") -> bool:
    """Return the same for the content of a caption: its looks ("red circle") and the zone of a single object.

    A single look without a zone is unseen only if it is one of `world.unseen_looks`.
    """
    if any(look in world.unseen_looks for look in looks):
        return True
    is_content = len(looks) > 1 or bool(zone)
    return is_content and _content_draw(world.seed, " + ".join(sorted(looks)) + f" {zone}") < world.unseen


@cache
def _content_draw(seed: int, content: str) -> float:
    return draw_generator(seed, f"unseen/{content}", 0).random()


def _edit(world: World, draws: np.random.Generator, ground: Ground, kind: str) -> Edit:
    if kind in ("remove", "add"):
        return _remove_or_add(_scene(world, draws, ground, "two"), int(draws.integers(2)), kind)
    scene = _scene(world, draws, ground, "single" if draws.random() < 0.5 else "two")
    index = int(draws.integers(len(scene.objects)))
    subject = scene.objects[index]
    others = {(o.shape, o.color) for o in scene.objects}
    if kind == "color":
        allowed = [c for c in COLORS if (subject.shape, c) not in others]
        result = replace(subject, color=allowed[draws.integers(len(allowed))])
    else:
        allowed = [s for s in world.shapes if (s, subject.color) not in others]
        result = replace(subject, shape=allowed[draws.integers(len(allowed))])
    objects = tuple(result if i == index else o for i, o in enumerate(scene.objects))
    return Edit(kind, scene, replace(scene, objects=objects), subject, result)  # pyright: ignore[reportArgumentType]


def _remove_or_add(two: Scene, index: int, kind: str) -> Edit:
    subject = two.objects[index]
    remaining = Scene("single", (two.objects[1 - index],), two.ground)
    if kind == "remove":
        return Edit("remove", two, remaining, subject, None)
    return Edit("add", remaining, two, subject, subject)


def _scene(world: World, draws: np.random.Generator, ground: Ground, kind: str) -> Scene:
    if kind == "single":
        zones = [ZONES[draws.integers(len(ZONES))]]
        places, looks = [_place(draws, zones[0], 1.6, 2.1)], [_look(world, draws)]
    elif kind == "two":
        zones, places = _pair(draws, shift=4.0)
        looks = [_look(world, draws), _look(world, draws)]
        while looks[0] == looks[1]:
            looks[1] = _look(world, draws)
    else:
        number = int(draws.integers(2, 4))
        looks = [_look(world, draws)] * number
        if number == 2:
            zones, places = _pair(draws, shift=0.0)
        else:
            zones, places = [None] * 3, _three(draws)
    bounds = RADIUS if len(places) < 3 else RADIUS_OF_THREE
    unit = world.size / UNIT_SIZE
    objects = tuple(
        Object(shape, color, draws.uniform(*bounds) * unit, x * unit, y * unit, zone)
        for (shape, color), (x, y), zone in zip(looks, places, zones, strict=True)
    )
    return Scene(kind, objects, ground)  # pyright: ignore[reportArgumentType]


def _look(world: World, draws: np.random.Generator) -> tuple[str, str]:
    return world.shapes[draws.integers(len(world.shapes))], COLORS[draws.integers(len(COLORS))]


def _place(draws: np.random.Generator, zone: str, along: float, across: float) -> tuple[float, float]:
    """Return a centre in a zone, jittered by +-`along` perpendicular to the edge and +-`across` parallel to it."""
    a, b = draws.uniform(-along, along), draws.uniform(-across, across)
    far = 2 * CENTER - EDGE
    return {
        "left": (EDGE + a, CENTER + b),
        "right": (far + a, CENTER + b),
        "top": (CENTER + b, EDGE + a),
        "bottom": (CENTER + b, far + a),
        "center": (CENTER + a, CENTER + b * along / across),
    }[zone]


def _pair(draws: np.random.Generator, shift: float) -> tuple[list[str | None], list[tuple[float, float]]]:
    """Return two facing zones (left and right, or top and bottom) and a centre in each."""
    zones: list[str | None] = ["left", "right"] if draws.random() < 0.5 else ["top", "bottom"]
    return zones, [_place(draws, zone, 1.2, max(shift, 1.5)) for zone in zones if zone]


def _three(draws: np.random.Generator) -> list[tuple[float, float]]:
    """Return the centres of three objects: two below, one on top."""
    far = 2 * CENTER - EDGE
    middles = [(EDGE, far), (far, far), (CENTER, EDGE)]
    return [(x + draws.uniform(-0.6, 0.6), y + draws.uniform(-0.6, 0.6)) for x, y in middles]


def _ground(world: World, purpose: str, number: int) -> Ground:
    """Return a background. Its draws are separate, so that a textured world has the same objects."""
    draws = draw_generator(world.seed, f"{purpose}/ground", number)
    level = draws.uniform(0.80, 0.95) if draws.random() < 0.6 else draws.uniform(0.06, 0.20)
    ground = Ground(level, draws.uniform(0.0, 0.05), draws.uniform(0.0, 2 * math.pi))
    if not world.texture:
        return ground
    return replace(
        ground,
        stripes=draws.uniform(0.06, 0.15),
        wavelength=draws.uniform(4.0, 10.0) * world.size / UNIT_SIZE,
        stripes_angle=draws.uniform(0.0, math.pi),
        phase=draws.uniform(0.0, 2 * math.pi),
    )
