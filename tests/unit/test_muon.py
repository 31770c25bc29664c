"""DeepSpeed's Muon on convolution weights, and canaries that say when the workarounds can go."""

from __future__ import annotations

import pytest
import torch

from parallel.optimizers.muon import muon_step

CPU = torch.device("cpu")


def muon_update(grad: torch.Tensor, momentum: torch.Tensor) -> torch.Tensor:
    from deepspeed.runtime.zero.muon import original_muon

    return original_muon.muon_update(grad, momentum)


def test_a_convolution_is_orthogonalised_as_a_matrix() -> None:
    grad = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9).view(8, 1, 1, 1)
    momentum, flat_momentum = torch.zeros(8, 4, 3, 3), torch.zeros(8, 36)
    with muon_step(CPU):
        update = muon_update(grad.clone(), momentum)
        flat = muon_update(grad.flatten(1).clone(), flat_momentum)
    assert update.shape == grad.shape
    assert torch.equal(update.flatten(1), flat)
    assert torch.equal(momentum.flatten(1), flat_momentum)
    assert flat_momentum.abs().sum() > 0
    assert condition(flat) < 2 < 4 < condition(grad.flatten(1))


def test_on_a_cpu_the_iteration_runs_in_fp32() -> None:
    from deepspeed.runtime.zero.muon import original_muon

    dtypes = []
    with muon_step(CPU):
        dtypes += [original_muon.ns_compute_dtype(method) for method in ("gram", "standard")]
        update = muon_update(torch.randn(16, 32, generator=torch.Generator().manual_seed(0)), torch.zeros(16, 32))
    assert dtypes == [torch.float32] * 2
    assert not torch.equal(update, update.half().float())
    assert original_muon.ns_compute_dtype("standard") == torch.bfloat16


def condition(matrix: torch.Tensor) -> float:
    """Largest over smallest singular value."""
    singular = torch.linalg.svdvals(matrix)
    return float(singular.max() / singular.min())


def test_the_original_is_back_after_the_step() -> None:
    from deepspeed.runtime.zero.muon import original_muon

    before = original_muon.muon_update
    with pytest.raises(ZeroDivisionError), muon_step(CPU):
        assert original_muon.muon_update is not before
        raise ZeroDivisionError
    assert original_muon.muon_update is before


def test_canary_deepspeed_still_breaks_on_convolutions() -> None:
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match="must match"):
        muon_update(torch.randn(8, 4, 3, 3), torch.zeros(8, 4, 3, 3))
