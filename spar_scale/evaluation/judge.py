"""The strict judge: does a picture show exactly what was asked for?

Every object that the detector finds counts. The shapes and colours found must be those asked for, each as
often as asked for: one blob too many, one that no shape fits, or two that run into each other fail, and so
does an object in another zone or on the wrong side. Lengths are those of a 32-pixel image.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

from spar_scale.data.shapes_world import CENTER, UNIT_SIZE, Object
from spar_scale.evaluation.detector import Found
from spar_scale.evaluation.requests import Request

CENTRAL = 3.9  # pixels from the middle, along x and y, up to which a place is the center
BESIDE = 2.5  # pixels that an object must lie to a side of another
TOLERANCE = 4.5  # pixels along x and y that an object of a scene may be off its place


def fulfils(request: Request, found: Sequence[Found], size: int) -> bool:
    """Return whether the objects found in a picture of `size` pixels are those of a request, in their places."""
    if sorted(o.look for o in found) != sorted(request.looks):
        return False
    if request.zone is not None:
        return zone(found[0], size) == request.zone
    if request.side is not None:
        first = next(o for o in found if o.look == request.looks[0])
        second = next(o for o in found if o is not first)
        return _side(first, second, size) == request.side
    return True


def zone(o: Found, size: int) -> str:
    """Return the zone in which an object stands."""
    x, y = (value * UNIT_SIZE / size - CENTER for value in (o.x, o.y))
    if max(abs(x), abs(y)) < CENTRAL:
        return "center"
    return _direction(x, y)


def shows_looks(objects: Sequence[Object], found: Sequence[Found]) -> bool:
    """Return whether the shapes and colours found are those of a scene's objects, wherever they stand."""
    return sorted(o.look for o in found) == sorted(o.look for o in objects)


def shows_scene(objects: Sequence[Object], found: Sequence[Found], size: int) -> bool:
    """Return whether the objects found are a scene's in shape, colour and place, and no more."""
    reach = TOLERANCE * size / UNIT_SIZE
    return shows_looks(objects, found) and any(
        all(
            f.look == o.look and max(abs(f.x - o.x), abs(f.y - o.y)) < reach
            for f, o in zip(order, objects, strict=True)
        )
        for order in permutations(found)
    )


def _side(first: Found, second: Found, size: int) -> str | None:
    x, y = ((a - b) * UNIT_SIZE / size for a, b in ((first.x, second.x), (first.y, second.y)))
    return _direction(x, y) if max(abs(x), abs(y)) > BESIDE else None


def _direction(x: float, y: float) -> str:
    if abs(x) > abs(y):
        return "left" if x < 0 else "right"
    return "top" if y < 0 else "bottom"
