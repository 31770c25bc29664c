"""A layout that does not fit is refused with the nearest ones that do, written as they can be given."""

from __future__ import annotations

import pytest

from parallel.errors import UserError
from parallel.topology import Layout

REFUSED = {
    "zero under a pipeline": (
        Layout(pipeline=4, zero=3),
        8,
        "parallel.zero: found 3 with parallel.pipeline 4; a pipeline needs unsharded gradients and parameters; nearest "
        "that fit: parallel.pipeline=4 parallel.zero=1 or parallel.pipeline=1 parallel.zero=3",
    ),
    "world too large": (
        Layout(tensor=2, pipeline=2),
        6,
        "parallel: found tensor 2 x pipeline 2 in a world of 6 process(es), which must be a multiple of 4; nearest "
        "that fit: parallel.tensor=2 parallel.pipeline=1 or parallel.tensor=1 parallel.pipeline=2, or 4 or 8 processes",
    ),
    "world too small": (
        Layout(tensor=4, pipeline=2),
        4,
        "parallel: found tensor 4 x pipeline 2 in a world of 4 process(es), which must be a multiple of 8; nearest "
        "that fit: parallel.tensor=4 parallel.pipeline=1 or parallel.tensor=2 parallel.pipeline=2, or 8 processes",
    ),
    "a tensor size that nothing near divides": (
        Layout(tensor=3),
        4,
        "parallel: found tensor 3 x pipeline 1 in a world of 4 process(es), which must be a multiple of 3; nearest "
        "that fit: parallel.tensor=1 parallel.pipeline=1, or 3 or 6 processes",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_layout_that_does_not_fit_is_refused_with_the_nearest(case: str) -> None:
    layout, world, message = REFUSED[case]
    with pytest.raises(UserError) as error:
        layout.data(world)
    assert str(error.value) == message


def test_data_ranks_are_what_is_left() -> None:
    assert [Layout(2, 2).data(world) for world in (4, 8, 12)] == [1, 2, 3]
    assert Layout(zero=3).data(5) == 5


def test_a_pipeline_has_a_layer_for_every_stage() -> None:
    Layout(pipeline=6).check_layers(6, world=6)
    with pytest.raises(UserError) as error:
        Layout(tensor=2, pipeline=6).check_layers(5, world=12)
    assert str(error.value) == (
        "parallel.pipeline: found 6, but this phase has 5 layers, and every pipeline stage needs at least one; nearest "
        "that fit 12 process(es): parallel.tensor=2 parallel.pipeline=3 or parallel.tensor=2 parallel.pipeline=2"
    )
