"""The geometry of boxes against brute force, and the leaves that DCP reads and writes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from toy_fragments import KINDS, SHAPES, full, toy_fragments

from parallel.checkpoint.boxes import BoxSavePlanner, Fragment, GlobalTensor, TensorCut, boxes, leaves

_SMALL_SHAPES = [(), (1,), (7,), (3, 4), (1, 5), (5, 1), (2, 3, 4), (3, 1, 2, 2)]


@pytest.mark.parametrize("shape", _SMALL_SHAPES, ids=str)
def test_every_flat_range_is_cut_into_its_elements_in_flat_order(shape: tuple[int, ...]) -> None:
    numbers = torch.arange(math.prod(shape)).view(shape)
    for start, stop in itertools.combinations(range(numbers.numel() + 1), 2):
        cut = list(boxes(shape, start, stop))
        parts = [numbers[tuple(map(slice, offset, map(sum, zip(offset, size, strict=True))))] for offset, size in cut]
        assert torch.cat([part.reshape(-1) for part in parts]).tolist() == list(range(start, stop))
        assert len(cut) <= max(1, 2 * len(shape) - 1)


def test_an_empty_range_has_no_boxes() -> None:
    assert list(boxes((3, 4), 5, 5)) == []


@pytest.mark.parametrize("per_parameter", [False, True])
@pytest.mark.parametrize(("tensor", "weights"), [(1, (1,)), (1, (1, 2, 5)), (2, (1,)), (2, (3, 1)), (4, (2, 1, 1))])
def test_the_pieces_of_all_ranks_tile_the_global_tensors(
    tensor: int, weights: tuple[int, ...], per_parameter: bool
) -> None:
    for kind, name in itertools.product(KINDS, SHAPES):
        assembled, times = torch.zeros(SHAPES[name]), torch.zeros(SHAPES[name])
        for rank in range(tensor * len(weights)):
            fragments = toy_fragments(rank, tensor, weights, per_parameter, filled=True)
            leaf = leaves(fragments, {}, saving=True).get(f"{kind}.{name}")
            for offset, view in leaf.pieces.items() if leaf else ():
                place = tuple(slice(o, o + n) for o, n in zip(offset, view.shape, strict=True))
                assembled[place], times[place] = view, times[place] + 1
        assert torch.equal(assembled, full(name, kind))
        assert torch.all(times == 1)


def test_pieces_are_views_that_write_through() -> None:
    flat = torch.zeros(12)
    fragment = Fragment("w", (3, 4), 2, {"model": flat[1:8]}, TensorCut(1, (3, 8), ((0, 2), (4, 2))), True)
    leaf = GlobalTensor((3, 8))
    leaf.add(fragment, "model")
    for view in leaf.pieces.values():
        view.fill_(1.0)
    assert flat.tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0]


def test_a_range_outside_its_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.w: range \[4, 7\) is not in \(2, 3\)"):
        leaves([Fragment("w", (2, 3), 4, {"model": torch.zeros(3)}, None, True)], {}, saving=True)


def test_overlapping_fragments_of_one_rank_are_refused() -> None:
    fragment = Fragment("w", (4,), 0, {"model": torch.zeros(2)}, None, True)
    with pytest.raises(ValueError, match="two pieces at offset"):
        leaves([fragment, fragment], {}, saving=True)


def test_a_fragment_of_another_writer_is_loaded_but_not_saved() -> None:
    fragment = Fragment("w", (4,), 0, {"model": torch.zeros(4)}, None, writes=False)
    assert leaves([fragment], {}, saving=True) == {}
    assert set(leaves([fragment], {}, saving=False)) == {"model.w"}


def test_kinds_rename_and_select() -> None:
    fragment = Fragment("w", (4,), 0, {"model": torch.zeros(4), "exp_avg": torch.zeros(4)}, None, True)
    found = leaves([fragment], {}, saving=False, kinds={"model": "ema"})
    assert set(found) == {"ema.w"}
    assert next(iter(found["ema.w"].pieces.values())).data_ptr() == fragment.tensors["model"].data_ptr()


def _plan(flat: torch.Tensor, start: int, shape: tuple[int, ...] = (2, 4)):
    state = leaves([Fragment("w", shape, start, {"model": flat}, None, True)], {}, saving=True)
    return create_default_local_save_plan(state, True)


@pytest.mark.parametrize(
    ("plans", "message"),
    [
        ([_plan(torch.zeros(8), 0), _plan(torch.zeros(8), 0)], "written twice"),  # DCP would pick one in silence
        ([_plan(torch.zeros(4), 0)], "4 of 8 elements"),  # DCP does not look when there is one rank
        ([_plan(torch.zeros(4), 0), _plan(torch.zeros(3), 5)], "7 of 8 elements"),
        ([_plan(torch.zeros(6), 0), _plan(torch.zeros(2), 5)], "overlapping"),
        ([_plan(torch.zeros(4), 0), _plan(torch.zeros(4), 4, (2, 5))], "disagree on its shape"),
    ],
    ids=["twice", "gap alone", "gap", "overlap", "shapes"],
)
def test_a_plan_with_gaps_or_overlaps_is_refused(plans: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BoxSavePlanner().create_global_plan(plans)
