"""Text-to-image prompts of five kinds for the miniature world, each with the objects that the picture must show.

The prompts of a kind are all prompts that the world's captions can contain, shuffled with a seed. The shuffled list
is repeated until there are enough prompts, so they cover looks, zones and numbers evenly. Prompts whose content is
held out of training (`shapes_world.is_unseen_content`) are requested separately; no training caption contains them.
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
    """A prompt and the objects that it describes: their looks ("red circle") in the order of the prompt.

    `zone` is the required zone of a single object. `side` is the required side ("left", "top", ...) of the first
    object relative to the second.
    """

    kind: str
    prompt: str
    looks: tuple[str, ...]
    zone: str | None = None
    side: str | None = None


def select_requests(world: World, kind: str, unseen: bool, count: int, seed: int = 0) -> list[Request]:
    """Return `count` requests of a kind, all with unseen or all with seen contents; [] if the world has none."""
    candidates = [r for r in _all_of_kind(world, kind) if is_unseen_content(world, r.looks, r.zone or "") is unseen]
    if not candidates:
        return []
    order = draw_generator(seed, f"requests/{kind}/{unseen}", 0).permutation(len(candidates))
    return [candidates[order[number % len(candidates)]] for number in range(count)]


def _all_of_kind(world: World, kind: str) -> Iterator[Request]:
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
        for (first, second), (side, words) in product(permutations(looks, 2), sides.items()):
            yield Request(kind, f"a {first} {words} a {second}", (first, second), side=side)
