"""What `start` sets up in a process besides the world."""

from __future__ import annotations

import torch
from launching import preload, run_world

preload("deepspeed")


def _smallest_products(rank: int, size: int) -> float:
    from parallel.launch.world import start

    start()
    torch.set_num_threads(2)
    return float((torch.full((1 << 20,), 1e-30) * 1e-10).max())  # enough elements for both threads


def test_numbers_too_small_for_a_normal_float_count_as_zero() -> None:
    assert run_world(1, _smallest_products) == [0.0]
