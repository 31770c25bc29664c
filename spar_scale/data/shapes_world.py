"""The miniature world: small captioned scenes of coloured shapes, questions about them, and edits.

Easy on purpose: at 32x32 pixels with one to three large objects on a plain ground, two CPU cores
learn to draw and describe them in minutes; `texture` lays stripes over the ground where a harder
world is wanted. Scene n is a function of (seed, purpose, n) alone: it depends neither on how many
scenes are made nor on how they are cut into shards, and `texture` changes the ground only.

Some contents are kept from training, so that what held-out data ask for can be new: a content is a look
(shape and colour) in a zone, an unordered pair of looks, or a number of one look. Training draws a scene
again until its content may be seen; held-out data draw freely.

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
TRAINING = ("scenes", "edits")  # the purposes that never show an unseen content
KINDS = ("single", "two", "count")
KIND_SHARES = (0.46, 0.42, 0.12)

UNIT_SIZE = 32  # the image side in which the lengths below are given
CENTER, EDGE = 16.0, 8.2  # where objects stand: in the middle, or this far from an edge
RADIUS, RADIUS_OF_THREE = (5.4, 6.8), (5.2, 5.8)


class World(BaseModel):
    """Settings of a miniature world: how large, how many, how hard."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(default=32, ge=16, le=1024, description="side of the images in pixels")
    seed: int = Field(default=0, ge=0, description="scenes of one seed are the same wherever they are made")
    scenes: int = Field(default=20000, ge=0, description="captioned scenes for training")
    heldout: int = Field(default=1000, ge=0, description="captioned scenes for evaluation, from draws of their own")
    edits: int = Field(default=8000, ge=0, description="editing triplets: input, instruction, output")
    heldout_edits: int = Field(default=0, ge=0, description="editing triplets for evaluation")
    per_shard: int = Field(default=2000, ge=1, description="samples in one tar")
    texture: bool = Field(default=False, description="stripes on the ground")
    shapes: tuple[str, ...] = Field(default=SHAPES[:3], min_length=3, description="the shapes that occur")
    unseen: float = Field(default=0.1, ge=0, le=0.5, description="share of contents that only held-out data shows")
    unseen_looks: tuple[str, ...] = Field(default=(), description='looks only held-out data shows, as "red cross"')

    @field_validator("shapes")
    @classmethod
    def _known_shapes(cls, shapes: tuple[str, ...]) -> tuple[str, ...]:
        if strangers := [shape for shape in shapes if shape not in SHAPES]:
            raise ValueError(
                f"{strangers[0]!r} is no shape{nearest(strangers[0], SHAPES)}; there are {', '.join(SHAPES)}"
            )
        if len(set(shapes)) < len(shapes):
            raise ValueError("a shape is named twice")
        return shapes

    @model_validator(mode="after")
    def _known_looks(self) -> World:
        looks = [f"{color} {shape}" for color in COLORS for shape in self.shapes]
        if strangers := [look for look in self.unseen_looks if look not in looks]:
            raise ValueError(f"unseen_looks: {strangers[0]!r} is no look of this world{nearest(strangers[0], looks)}")
        if 2 * len(self.unseen_looks) > len(looks):
            raise ValueError(
                f"unseen_looks: {len(self.unseen_looks)} of {len(looks)} looks; at most half can be kept away"
            )
        return self


@dataclass(frozen=True)
class Object:
    """A shape in the image: radius and centre in pixels, the zone it stands in if it can be named."""

    shape: str
    color: str
    radius: float
    x: float
    y: float
    zone: str | None

    @property
    def look(self) -> str:
        """Colour and shape, as captions say them."""
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
    """One image: its kind, its objects in the order they are drawn, its ground.

    `kind` says how it may be described: "single" by the object's zone, "two" by a relation, "count"
    by a number of equal objects.
    """

    kind: Literal["single", "two", "count"]
    objects: tuple[Object, ...]
    ground: Ground

    def as_json(self) -> dict[str, Any]:
        """Return the scene as plain values."""
        objects = [dict(vars(o)) for o in self.objects]  # dataclasses.asdict copies deeply, at ten times the time
        return {"kind": self.kind, "objects": objects, "ground": dict(vars(self.ground))}


@dataclass(frozen=True)
class Edit:
    """An editing triplet: every object that the instruction does not name, and the ground, stay the same."""

    kind: Literal["color", "shape", "remove", "add"]
    source: Scene
    target: Scene
    subject: Object  # what is changed or removed, as it is before; or what is added
    result: Object | None  # what it becomes; None where it is removed


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
    """Return whether training never shows what this scene shows: its content, or the look of one of its objects."""
    looks = [o.look for o in scene.objects]
    if scene.kind == "single":
        return is_unseen_content(world, looks, scene.objects[0].zone or "")
    return is_unseen_content(world, looks)


def is_unseen_content(world: World, looks: Sequence[str], zone: str = "") -> bool:
    """The same of what a caption says: its looks ("red circle") and the zone of a single one.

    A single look without a zone is unseen only where the world keeps the look itself away.
    """
    if any(look in world.unseen_looks for look in looks):
        return True
    told = len(looks) > 1 or bool(zone)
    return told and _content_draw(world.seed, " + ".join(sorted(looks)) + f" {zone}") < world.unseen


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
    one = Scene("single", (two.objects[1 - index],), two.ground)
    if kind == "remove":
        return Edit("remove", two, one, subject, None)
    return Edit("add", one, two, subject, subject)


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
    """Return a centre in a zone, jittered by +-`along` towards the edge and +-`across` beside it."""
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
    """The ground has draws of its own, so that a textured world holds the same objects."""
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
