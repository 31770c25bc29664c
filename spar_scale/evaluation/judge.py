"""The strict judge: decides whether a picture shows exactly the objects of a request or a scene.

Every detected object counts. The detected shapes and colours must be the expected ones, each in the expected number.
A picture fails with one blob too many, a blob that no shape fits, two merged objects, an object in the wrong zone, or
an object on the wrong side of another. Lengths are those of a 32-pixel image.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

from spar_scale.data.shapes_world import CENTER, UNIT_SIZE, Object
from spar_scale.evaluation.detector import DetectedObject
from spar_scale.evaluation.requests import Request

CENTRAL = 3.9  # an object within this many pixels of the middle, along x and y, is in the zone "center"
BESIDE = 2.5  # minimum distance in pixels for an object to be on a side of another
TOLERANCE = 4.5  # an object of a scene may be this many pixels away from its place, along x and y


def fulfils(request: Request, detected: Sequence[DetectedObject], size: int) -> bool:
    """Return whether the objects detected in a picture of `size` pixels are those of a request, in their places."""
    if sorted(o.look for o in detected) != sorted(request.looks):
        return False
    if request.zone is not None:
        return zone(detected[0], size) == request.zone
    if request.side is not None:
        first = next(o for o in detected if o.look == request.looks[0])
        second = next(o for o in detected if o is not first)
        return _side(first, second, size) == request.side
    return True


def zone(o: DetectedObject, size: int) -> str:
    """Return the zone of an object: "center", "left", "right", "top" or "bottom"."""
    x, y = (value * UNIT_SIZE / size - CENTER for value in (o.x, o.y))
    if max(abs(x), abs(y)) < CENTRAL:
        return "center"
    return _direction(x, y)


def shows_looks(objects: Sequence[Object], detected: Sequence[DetectedObject]) -> bool:
    """Return whether the detected shapes and colours are those of a scene's objects, in any place."""
    return sorted(o.look for o in detected) == sorted(o.look for o in objects)


def shows_scene(objects: Sequence[Object], detected: Sequence[DetectedObject], size: int) -> bool:
    """Return whether the detected objects are exactly those of a scene, in shape, colour and place."""
    reach = TOLERANCE * size / UNIT_SIZE
    return shows_looks(objects, detected) and any(
        all(
            d.look == o.look and max(abs(d.x - o.x), abs(d.y - o.y)) < reach
            for d, o in zip(order, objects, strict=True)
        )
        for order in permutations(detected)
    )


def _side(first: DetectedObject, second: DetectedObject, size: int) -> str | None:
    x, y = ((a - b) * UNIT_SIZE / size for a, b in ((first.x, second.x), (first.y, second.y)))
    return _direction(x, y) if max(abs(x), abs(y)) > BESIDE else None


def _direction(x: float, y: float) -> str:
    if abs(x) > abs(y):
        return "left" if x < 0 else "right"
    return "top" if y < 0 else "bottom"
