"""A part of the list of layers, run for slots that are not its losses, gives what the whole list gives."""

from __future__ import annotations

import functools

import pytest
import torch
from toy_program import INPUTS, TERMS, Distance, Residual, Size, Teacher, Toy, Widen, inputs

from parallel.program import (
    Apply,
    Layer,
    Program,
    Subprogram,
    crossing_slots,
    live_slots,
    repeat_derived,
    run_layer,
)

SLOTS = {"x": inputs(0), "a": inputs(1)}
CASES = {
    "a teacher": (["t"], [Teacher], ("a",)),
    "a term": (["size"], [Widen, Residual, Residual, Size], ("x",)),
    "two terms": (["distance", "size"], [Teacher, Widen, Residual, Distance, Residual, Size], ("a", "x")),
}


@pytest.mark.parametrize("case", CASES)
def test_the_layers_that_lead_to_the_wanted_slots_run_and_no_others(case: str) -> None:
    wanted, layers, read = CASES[case]
    part = Subprogram(list(Toy().layers), wanted)  # type: ignore[arg-type]
    assert [type(layer) for layer in part.layers] == layers
    assert part.inputs == read
    found = part({name: SLOTS[name] for name in read})
    assert set(found) == set(wanted)


def test_it_computes_what_the_whole_list_computes() -> None:
    layers = list(Toy().layers)
    whole = Program(layers, INPUTS, list(TERMS))(SLOTS)  # type: ignore[arg-type]
    found = Subprogram(layers, list(TERMS))(SLOTS)  # type: ignore[arg-type]
    assert all(torch.equal(whole[:, place], found[name]) for place, name in enumerate(TERMS))


def test_a_given_slot_replaces_the_layers_that_compute_it() -> None:
    layers = list(Toy().layers)
    teacher = Subprogram(layers, ["t"])(SLOTS)["t"]  # type: ignore[arg-type]
    part = Subprogram(layers, ["distance"], given=("t", "not read"))  # type: ignore[arg-type]
    assert [type(layer) for layer in part.layers] == [Widen, Residual, Distance] and part.inputs == ("t", "x")
    whole = Subprogram(layers, ["distance"])(SLOTS)  # type: ignore[arg-type]
    assert torch.equal(part({"t": teacher, "x": SLOTS["x"]})["distance"], whole["distance"])


def test_a_needed_layer_that_would_write_over_a_given_slot_is_refused() -> None:
    both = Apply(torch.aminmax, ("x",), ("least", "most"))
    with pytest.raises(ValueError, match=r"aminmax is needed and would write \['most'\], which are given"):
        Subprogram([both], ["least"], given=("most",))


def test_an_applied_function_is_a_layer_of_its_reads_and_writes() -> None:
    linear = torch.nn.Linear(8, 3)
    layer = Apply(linear, ("x",), "y", frozen=True)
    assert list(layer.parameters()) == list(linear.parameters()) and layer.name == "Linear"
    assert torch.equal(layer(x=SLOTS["x"])["y"], linear(SLOTS["x"]))
    assert not run_layer(layer, {"x": SLOTS["x"]}, ("y",))["y"].requires_grad
    assert Apply(functools.partial(torch.mul, 2), ("x",), "y").name == "mul"


def derived_list() -> list[Layer]:
    """A mask from `keep`, read by the second and the fourth layer of six."""
    mask = Apply(torch.neg, ("keep",), "mask")
    mask.derived = True
    add = [Apply(torch.add, ("h", "mask" if number % 2 else "h"), "h") for number in range(5)]
    return [mask, *add]


def test_a_derived_slot_crosses_no_cut_and_is_computed_again_behind_it() -> None:
    layers = derived_list()
    crossing = crossing_slots(layers, ("h", "keep"), ("h",))
    assert crossing == [("h", "keep")] * 5 + [("h",), ("h",)]  # nothing reads the mask behind the fifth
    longer, bounds = repeat_derived(layers, [0, 3, 5, 6], ("h", "keep"), ("h",))
    assert [layer.name for layer in longer] == ["neg", "add", "add", "neg", "add", "add", "add"]
    assert bounds == [0, 3, 6, 7]
    slots = {"h": torch.ones(2), "keep": torch.tensor([3.0, 5.0])}
    results = [Program(listed, ("h", "keep"), ("h",))(slots) for listed in (layers, longer)]
    assert torch.equal(*results)
    edges = live_slots(longer, ("h", "keep"), ("h",))
    assert [edges[place] for place in bounds] == [("h", "keep"), ("h", "keep"), ("h",), ("h",)]
