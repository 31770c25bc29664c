"""A part of the list of layers, run for slots that are not its losses, gives what the whole list gives."""

from __future__ import annotations

import pytest
import torch
from toy_program import INPUTS, TERMS, Distance, Residual, Size, Teacher, Toy, Widen, inputs

from parallel.program import Program, Subprogram

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
