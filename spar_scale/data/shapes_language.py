"""Texts about scenes of the miniature world: captions, questions with answers, instructions.

Every sentence is true for its scene and consists of words of `VOCABULARY`, separated by spaces.
"""

from __future__ import annotations

import numpy as np

from spar_scale.data.shapes_world import COLORS, SHAPES, ZONES, Edit, Object, Scene, World

SPECIAL = ("<pad>", "<bos>", "<eos>")
PLURALS = tuple(f"{shape}es" if shape.endswith("s") else f"{shape}s" for shape in SHAPES)
NUMBERS = ("zero", "one", "two", "three")
QUESTIONS = ("color", "shape", "count", "where", "exist")
RELATIONS = {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}
_REST = (
    "above below of a and , the on in is there what color shape where how many objects object are ? yes no"
    " question answer describe draw edit : make remove add turn into ."
)
VOCABULARY = (*SPECIAL, *SHAPES, *PLURALS, *COLORS, *NUMBERS, *ZONES, *_REST.split())


def captions(scene: Scene) -> list[str]:
    """Return the captions of a scene, the most detailed first.

    One is drawn at random, so the caption of a single object names its place in two of three cases.
    """
    first = scene.objects[0]
    if scene.kind == "single":
        return [f"{name(first)} {place(first)}"] * 2 + [name(first)]
    if scene.kind == "count":
        return [f"{NUMBERS[len(scene.objects)]} {first.color} {PLURALS[SHAPES.index(first.shape)]}"]
    second = scene.objects[1]
    return [
        f"{name(first)} {_relation(first)} {name(second)}",
        f"{name(second)} {_relation(second)} {name(first)}",
        f"{name(first)} and {name(second)}",
        f"{name(second)} and {name(first)}",
    ]


def choose_caption(scene: Scene, draws: np.random.Generator) -> str:
    """Return one of the captions, drawn at random."""
    choices = captions(scene)
    return choices[int(draws.random() * len(choices))]


def questions(scene: Scene, world: World, draws: np.random.Generator) -> list[dict[str, str]]:
    """Return the questions with a unique answer for this scene, as {"type", "question", "answer"}.

    "Is there" questions come in pairs of yes and no for each object. The "no" question is about an object that differs
    in shape or in colour only, and never about a look that is held out of training.
    """
    objects = scene.objects if scene.kind != "count" else scene.objects[:1]
    entries = [("count", "how many objects are there ?", NUMBERS[len(scene.objects)])]
    for index, o in enumerate(objects):
        others = objects[:index] + objects[index + 1 :]
        if scene.kind != "count" and all(o.shape != other.shape for other in others):
            entries.append(("color", f"what color is the {o.shape} ?", o.color))
        if scene.kind != "count" and all(o.color != other.color for other in others):
            entries.append(("shape", f"what shape is the {o.color} object ?", o.shape))
        if scene.kind != "count" and o.zone:
            entries.append(("where", f"where is the {o.look} ?", o.zone))
        entries.append(("exist", f"is there {name(o)} ?", "yes"))
        color, shape = _absent(scene, o, world, draws)
        entries.append(("exist", f"is there a {color} {shape} ?", "no"))
    return [{"type": kind, "question": question, "answer": answer} for kind, question, answer in entries]


def instruction(edit: Edit, draws: np.random.Generator) -> str:
    """Return the instruction of an edit; half of the subjects are named by shape only if that is unambiguous."""
    subject, result = edit.subject, edit.result
    if edit.kind == "add":
        return f"add {name(subject)} {place(subject)}"
    alone = [o.shape for o in edit.source.objects].count(subject.shape) == 1
    the = f"the {subject.shape}" if alone and draws.random() < 0.5 else f"the {subject.look}"
    if result is None:
        return f"remove {the}"
    return f"make {the} {result.color}" if edit.kind == "color" else f"turn {the} into a {result.shape}"


def name(o: Object) -> str:
    """Return the name of an object: "a red circle"."""
    return f"a {o.look}"


def place(o: Object) -> str:
    """Return the place of an object as words: "on the left", "in the center"."""
    return "in the center" if o.zone == "center" else f"on the {o.zone}"


def _relation(o: Object) -> str:
    assert o.zone is not None
    return RELATIONS[o.zone]


def _absent(scene: Scene, o: Object, world: World, draws: np.random.Generator) -> tuple[str, str]:
    """Return (colour, shape) of an object that the scene lacks; if possible it differs from `o` in only one of them."""
    present = {(other.color, other.shape) for other in scene.objects}
    looks = [(c, s) for c in COLORS for s in world.shapes if f"{c} {s}" not in world.unseen_looks]
    absent = [look for look in looks if look not in present]
    recolored = [(c, s) for c, s in absent if s == o.shape]
    reshaped = [(c, s) for c, s in absent if c == o.color]
    allowed = (recolored if draws.random() < 0.5 else reshaped) or absent
    return allowed[draws.integers(len(allowed))]
