"""The network beside the engine: equal to plain torch on the whole batch, under any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from launching import run_world
from torch import nn
from toy_program import GLOBAL_BATCH, inputs, micro_batches

STEPS, LR, BETAS = 6, 1e-2, (0.5, 0.9)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.1), nn.Linear(16, 1))


def values(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.relu(1 - module(x)).squeeze(1)


def train(
    rank: int, world: int, clip: float, poison: int | None = None, tensor: int = 1
) -> tuple[list[float], dict[str, Any]]:
    from parallel.launch.world import start
    from parallel.replica import Replica
    from parallel.topology import Layout, Topology

    launch, topology = start(), Topology(Layout(tensor=tensor))
    replica = Replica("judge", network(), topology, launch.device, BETAS)
    norms = []
    for step in range(STEPS):
        for batch in micro_batches(step, topology.data_rank, topology.data_size, 2, poison=step == poison):
            counted = torch.where(batch["weight"] > 0, values(replica.module, batch["x"]), 0.0)
            (counted.sum() / GLOBAL_BATCH).backward()
        norms.append(float(replica.step(LR, clip)))
    return norms, {name: tensor.clone() for name, tensor in replica.tensors().items()}


def plain(clip: float) -> tuple[list[float], nn.Module]:
    module = network()
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, betas=BETAS, weight_decay=0.0)
    norms = []
    for step in range(STEPS):
        (values(module, inputs(step)).sum() / GLOBAL_BATCH).backward()
        norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), clip or float("inf"))))
        optimizer.step()
        optimizer.zero_grad()
    return norms, module


@pytest.mark.parametrize("clip", [0.0, 0.1])
@pytest.mark.parametrize(("world", "tensor"), [(1, 1), (3, 1), (4, 2)])
def test_a_replica_trains_as_plain_torch_does(world: int, tensor: int, clip: float) -> None:
    norms, module = plain(clip)
    for found, tensors in run_world(world, train, clip, None, tensor, initialise=False):
        assert found == pytest.approx(norms, rel=1e-4)
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(tensors[f"judge.{name}"], parameter.detach(), rtol=1e-4, atol=1e-5)
            assert tensors[f"judge.{name}.step"] == STEPS


def test_a_non_finite_gradient_leaves_it_as_it_was() -> None:
    norms, tensors = run_world(2, train, 0.0, 3, initialise=False)[1]
    assert not torch.isfinite(torch.tensor(norms[3]))
    assert {int(tensor) for name, tensor in tensors.items() if name.endswith(".step")} == {STEPS - 1}
    assert all(tensor.isfinite().all() for tensor in tensors.values())
