"""What `start` sets up in a process besides the world."""

from __future__ import annotations

import subprocess
import sys

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


def test_deepspeed_is_imported_without_mlflow() -> None:
    """Fails where DeepSpeed's autotuner no longer imports it: `import_deepspeed` is then not needed."""
    code = """
import sys
from parallel.launch.imports import import_deepspeed
import_deepspeed()
from deepspeed.autotuning import autotuner
print(autotuner.has_mlflow, "mlflow" in sys.modules)
import mlflow
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ["False", "False"]
