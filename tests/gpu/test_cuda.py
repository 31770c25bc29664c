"""The same code on a CUDA device: a few steps of phase init with NCCL, fp32 near the CPU's curve, bf16 near fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import run_world
from tiny_runs import make_autoencoder, make_data, recipe_values, train_all

from spar_scale.runs.curves import curve, distance

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch"),
]


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_gpu_follows_the_cpu_and_bf16_follows_fp32(tmp_path: Path, zero: int) -> None:
    shards, autoencoder = make_data(tmp_path / "data"), make_autoencoder(tmp_path / "autoencoder")

    def train(name: str, hidden: bool, **changes) -> list[tuple[float, float]]:
        values = recipe_values(tmp_path / name, shards, autoencoder, parallel__zero=zero, **changes)
        environment = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if hidden else {"DS_ACCELERATOR": "cuda"}
        run_world(1, train_all, [values], initialise=False, env=environment)
        return curve(tmp_path / name)

    cpu, gpu, half = train("cpu", True), train("gpu", False), train("half", False, precision="bf16")
    assert distance(gpu, cpu)[0] < 1e-2  # other kernels, TF32 off by torch's default for products
    assert distance(half, gpu)[0] < 3e-2
