"""What is asked of a model that draws the miniature world: prompts of five kinds, and what each demands.

The prompts of a kind are all that the world's captions can say, in an order drawn from a seed, again and
again until there are enough; so they are spread evenly over looks, zones and numbers. Apart stand those
whose content training never shows (`shapes_world.is_unseen_content`), so no training caption says them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations, product

from spar_scale.data.order import draw_generator
from spar_scale.data.shapes_language import NUMBERS, PLURALS, RELATIONS
from spar_scale.data.shapes_world import COLORS, SHAPES, ZONES, World, is_unseen_content

KINDS = ("color", "position", "count", "two", "relation")
UNSEEN_KINDS = KINDS[1:]  # a look alone is unseen only in a world with `unseen_looks`


@dataclass(frozen=True)
class Request:
    """A prompt and the objects that it asks for: their looks ("red circle") in the order of the words.

    `zone` is that of a single object; `side` says where the first of two stands as seen from the second.
    """

    kind: str
    prompt: str
    looks: tuple[str, ...]
    zone: str | None = None
    side: str | None = None


def requests(world: World, kind: str, unseen: bool, count: int, seed: int = 0) -> list[Request]:
    """Return `count` requests of a kind, all of seen or all of unseen contents; none where there are none."""
    fitting = [r for r in _of_kind(world, kind) if is_unseen_content(world, r.looks, r.zone or "") is unseen]
    if not fitting:
        return []
    order = draw_generator(seed, f"requests/{kind}/{unseen}", 0).permutation(len(fitting))
    return [fitting[order[number % len(fitting)]] for number in range(count)]


def _of_kind(world: World, kind: str) -> Iterator[Request]:
    looks = [f"{color} {shape}" for shape in world.shapes for color in COLORS]
    if kind == "color":
        for look in looks:
            yield Request(kind, f"a {look}", (look,))
    elif kind == "position":
        for look, zone in product(looks, ZONES):
            where = "in the center" if zone == "center" else f"on the {zone}"
            yield Request(kind, f"a {look} {where}", (look,), zone=zone)
    elif kind == "count":
        for look, number in product(looks, (2, 3)):
            color, shape = look.split()
            yield Request(kind, f"{NUMBERS[number]} {color} {PLURALS[SHAPES.index(shape)]}", (look,) * number)
    else:
        sides = RELATIONS if kind == "relation" else {None: "and"}
        for (one, other), (side, words) in product(permutations(looks, 2), sides.items()):
            yield Request(kind, f"a {one} {words} a {other}", (one, other), side=side)
