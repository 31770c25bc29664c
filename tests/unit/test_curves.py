"""How far two curves lie apart: the largest relative difference, and never a small number for what is not finite."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from parallel.errors import UserError
from spar_scale.runs.curves import LOSS_FLOOR, curve, distance


def write(folder: Path, *steps: int) -> Path:
    lines = [json.dumps({"step": step, "loss": step / 2, "grad_norm": step * 3}) for step in steps]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_a_curve_is_the_loss_and_the_norm_of_every_step(tmp_path: Path) -> None:
    assert curve(write(tmp_path, 1, 2)) == [(0.5, 3), (1.0, 6)]


def test_a_value_that_was_not_finite_is_infinitely_far(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null, "grad_norm": null}\n')
    assert distance(curve(tmp_path), [(1.0, 1.0)]) == (math.inf, math.inf)


def test_a_damaged_line_is_refused_and_a_torn_last_one_left_out(tmp_path: Path) -> None:
    with (write(tmp_path, 1, 2) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert len(curve(tmp_path)) == 2
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="line 1 is damaged"):
        curve(tmp_path)


@pytest.mark.parametrize("steps", [(1, 3), (2,), (1, 1)])
def test_a_gap_or_a_repeated_step_is_no_curve(tmp_path: Path, steps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="are not 1, 2, 3"):
        curve(write(tmp_path, *steps))


def test_the_largest_difference_of_any_step_counts() -> None:
    loss, norm = distance([(1.0, 2.0), (4.4, 2.0)], [(1.0, 2.0), (4.0, 1.0)])
    assert loss == pytest.approx(0.1, rel=1e-5) and norm == 1.0


def test_a_loss_near_zero_has_a_floor_and_a_norm_has_none() -> None:
    near = 1e-9
    assert distance([(near + 0.9 * LOSS_FLOOR, near)], [(near, 2 * near)]) == (0.0, 0.5)
    assert distance([(near + 2 * LOSS_FLOOR, near)], [(near, near)])[0] == pytest.approx(LOSS_FLOOR / near)
    assert distance([(near + 0.9 * LOSS_FLOOR, near)], [(near, near)], floor=0.0)[0] > 100


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_infinitely_far(value: float) -> None:
    assert distance([(value, 1.0)], [(1.0, 1.0)]) == (math.inf, 0.0)
    assert distance([(1.0, 1.0), (1.0, 2.0)], [(1.0, value), (1.0, 2.0)]) == (0.0, math.inf)


def test_a_difference_from_zero_is_infinitely_far() -> None:
    assert distance([(1.0, 0.0)], [(0.0, 0.0)]) == (math.inf, 0.0)


@pytest.mark.parametrize("lengths", [(0, 0), (1, 2)])
def test_curves_of_other_lengths_are_not_compared(lengths: tuple[int, int]) -> None:
    one, two = ([(1.0, 1.0)] * length for length in lengths)
    with pytest.raises(ValueError, match="cannot be compared"):
        distance(one, two)
