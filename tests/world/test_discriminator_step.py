"""A step of the discriminator over ranks and micro-batches: the objective of the whole batch, at a rate of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import run_world
from tiny_runs import phase_values
from torch import Tensor

from parallel.errors import UserError
from spar_scale.config.recipe import Recipe

BATCH, START, LR, WARMUP, DECAY, LECAM = 6, 3, 1e-2, 10, 0.5, 2.0
EMA = (0.3, -0.4)  # of the real and of the fake logits, so that both halves of LeCam push
BAD = 4  # the sample that has weight 0


def recipe(**changes: Any) -> Recipe:
    values = phase_values(
        Path("nowhere"),
        "tokenizer/encoder",
        Path("nowhere"),
        {"pixel_autoencoder": "nowhere"},
        "nano",
        init_from="../parent",
        objective={"adversarial_weight": 0.1, "adversarial_start": START, "lecam_weight": LECAM},
        global_batch=BATCH,
        data__task_block=BATCH,
        train={"steps": 40},
        **{"discriminator": {"lr": LR, "warmup_steps": WARMUP, "weight_decay": DECAY}, **changes},
    )
    return Recipe.model_validate_json(json.dumps(values))


def pictures() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    real, fake = (torch.rand(BATCH, 3, 32, 32, generator=generator) for _ in range(2))
    weight = torch.ones(BATCH)
    fake[BAD], weight[BAD] = 9.0, 0.0
    return real, fake, weight


def step(rank: int, world: int, size: int, number: int) -> dict[str, Tensor]:
    """Take step `number` in micro-batches of `size` samples; return weights and moments."""
    from parallel.launch.world import start
    from parallel.topology import Layout, Topology
    from spar_scale.stages.adversary import Adversary

    launch, topology = start(), Topology(Layout())
    adversary = Adversary(recipe())
    adversary.bind(topology, launch.device, (0.5, 0.9))
    adversary.lecam.real_mean.fill_(EMA[0])
    adversary.lecam.fake_mean.fill_(EMA[1])
    adversary.begin_step(number)
    own = [part[rank * BATCH // world : (rank + 1) * BATCH // world] for part in pictures()]
    for batch in zip(*(part.split(size) for part in own), strict=True):
        adversary.observe(*batch)
    adversary.end_step(lr=7.0, clip=0.0)
    return {name: tensor.clone() for name, tensor in adversary.tensors().items()}


@pytest.fixture(scope="module")
def whole() -> dict[str, Tensor]:
    return run_world(1, step, BATCH, START + 1, initialise=False)[0]


def test_its_gradient_is_that_of_the_hinge_and_of_lecam_on_the_means_of_the_whole_batch(whole: dict[str, Tensor]):
    from spar_scale.objectives.adversarial import discriminator_loss
    from spar_scale.stages.adversary import Adversary

    module = Adversary(recipe()).module
    real, fake, weight = pictures()
    logits = [module(images[weight > 0]) for images in (real, fake)]
    above, below = torch.relu(logits[0].mean() - EMA[1]), torch.relu(EMA[0] - logits[1].mean())
    assert above > 0.1 and below > 0.1
    loss = discriminator_loss(*logits).sum() / BATCH + LECAM * (above.square() + below.square())
    names = [name for name, _ in module.named_parameters()]
    for name, gradient in zip(names, torch.autograd.grad(loss, list(module.parameters())), strict=True):
        torch.testing.assert_close(whole[f"discriminator.{name}.exp_avg"], 0.5 * gradient, rtol=1e-4, atol=1e-6)
    assert whole["discriminator.real_mean"].item() == pytest.approx(0.999 * EMA[0] + 0.001 * logits[0].mean().item())


@pytest.mark.parametrize(("world", "size"), [(1, 2), (2, 3), (3, 1)])
def test_ranks_and_micro_batches_do_not_change_it(whole: dict[str, Tensor], world: int, size: int):
    for found in run_world(world, step, size, START + 1, initialise=False):
        for name, tensor in whole.items():
            tolerance = 2e-4 if name.endswith("exp_avg") else 2e-2  # one step of Adam divides by the gradient itself
            torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=1e-6 if "exp_avg" in name else 2e-5)


@pytest.mark.parametrize(("number", "share"), [(START + 1, 1 / WARMUP), (START + 5, 5 / WARMUP)])
def test_its_rate_warms_up_from_its_own_start_and_matrices_alone_decay(number: int, share: float):
    from spar_scale.stages.adversary import Adversary

    before = {f"discriminator.{name}": tensor for name, tensor in Adversary(recipe()).module.named_parameters()}
    (after,) = run_world(1, step, BATCH, number, initialise=False)
    for name, tensor in before.items():
        # Adam's first step is the rate times the sign of the gradient, for all gradients far above eps.
        decayed = (1 - share * LR * DECAY if tensor.dim() > 1 else 1.0) * tensor.detach()
        moved = (after[name] - decayed).abs()[after[f"{name}.exp_avg"].abs() > 1e-5]
        torch.testing.assert_close(moved, torch.full_like(moved, share * LR), rtol=5e-3, atol=1e-6)


def test_judging_reaches_the_pictures_and_not_the_weights():
    from spar_scale.stages.adversary import Adversary

    adversary, images = Adversary(recipe()), torch.rand(2, 3, 32, 32, requires_grad=True)
    adversary.judge(images).sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in adversary.module.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"discriminator": {"warmup_steps": 5}}, "discriminator.warmup_steps: found 5, but discriminator.lr is null"),
        ({"discriminator": {"lr": 1e-4, "min_lr": 1e-3}}, r"discriminator.min_lr: found 0.001, must not be above"),
    ],
)
def test_a_schedule_without_a_rate_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


def test_two_rates_for_it_are_refused():
    from spar_scale.stages.adversary import Adversary

    with pytest.raises(
        UserError, match=r"optimizer.groups.discriminator: found 2.0, but discriminator.lr sets the rate"
    ):
        Adversary(recipe(optimizer__groups={"discriminator": 2.0}))
