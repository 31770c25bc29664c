"""The adversarial objectives and L_s against numbers worked by hand."""

import pytest
import torch

from spar_scale.objectives.adversarial import LeCam, discriminator_loss, generator_loss
from spar_scale.objectives.distillation import semantic_distillation


def logits(*samples: list[float]) -> torch.Tensor:
    """Maps of one row, (B, 1, 1, w)."""
    return torch.tensor(samples)[:, None, None]


def test_the_generators_loss_is_minus_the_mean_logit_of_each_sample():
    assert generator_loss(logits([1.0, 3.0], [-0.5, 0.0])).tolist() == [-2.0, 0.25]


def test_the_hinge_loss_by_hand():
    # sample 0: real relu(1 - 0.5) = 0.5, relu(1 - 2) = 0, mean 0.25; fake relu(1 - 2) = 0, relu(1 + 1) = 2, mean 1
    # sample 1: real relu(1 + 1) = 2, relu(1 - 1) = 0, mean 1; fake relu(1 - 0.5) = 0.5 twice
    real, fake = logits([0.5, 2.0], [-1.0, 1.0]), logits([-2.0, 1.0], [-0.5, -0.5])
    assert discriminator_loss(real, fake).tolist() == [0.625, 0.75]


def test_beyond_the_margin_the_hinge_gives_no_gradient_and_inside_a_half_each_way():
    real, fake = logits([0.0], [2.0]).requires_grad_(), logits([0.0], [-2.0]).requires_grad_()
    discriminator_loss(real, fake).sum().backward()
    assert real.grad is not None and real.grad.flatten().tolist() == [-0.5, 0.0]
    assert fake.grad is not None and fake.grad.flatten().tolist() == [0.5, 0.0]


def lecam(real_mean: float, fake_mean: float, decay: float = 0.75) -> LeCam:
    state = LeCam(decay)
    state.load_state_dict({"version": 1, "real_mean": torch.tensor(real_mean), "fake_mean": torch.tensor(fake_mean)})
    return state


def test_lecam_by_hand():
    # mean D(real) 2 lies 3 above the fakes' -1: 3^2 has slope 6; mean D(fake) -1.5 lies 2 below the real 0.5: -4
    slopes = lecam(0.5, -1.0).slopes(torch.tensor(2.0), torch.tensor(-1.5))
    assert [slope.item() for slope in slopes] == [6.0, -4.0]
    slopes = lecam(0.5, -1.0).slopes(torch.tensor(-2.0), torch.tensor(1.0))  # both on the other side
    assert [slope.item() for slope in slopes] == [0.0, 0.0]


def test_lecams_means_move_towards_those_of_a_batch_and_only_when_told():
    state = lecam(1.0, -2.0)
    state.slopes(torch.tensor(5.0), torch.tensor(5.0))
    assert (state.real_mean.item(), state.fake_mean.item()) == (1.0, -2.0)
    state.update(torch.tensor(3.0, requires_grad=True), torch.tensor(2.0))
    assert (state.real_mean.item(), state.fake_mean.item()) == (1.5, -1.0)  # 3/4 old + 1/4 new
    assert not state.real_mean.requires_grad


def test_lecam_starts_at_zero_and_decays_as_published():
    state = LeCam()
    state.update(torch.tensor(1.0), torch.tensor(-1.0))
    assert state.real_mean.item() == pytest.approx(0.001) and state.fake_mean.item() == pytest.approx(-0.001)


def test_lecam_goes_on_from_its_saved_state_which_later_updates_do_not_touch():
    first, second = lecam(0.5, -1.0), LeCam(0.75)
    saved = first.state_dict()
    first.update(torch.tensor(9.0), torch.tensor(9.0))
    second.load_state_dict(saved)
    second.update(torch.tensor(9.0), torch.tensor(9.0))
    assert torch.equal(first.real_mean, second.real_mean) and torch.equal(first.fake_mean, second.fake_mean)
    assert saved["real_mean"].item() == 0.5


def test_lecam_refuses_a_state_of_another_version_with_advice():
    with pytest.raises(ValueError, match=r"LeCam: state version 2, this program reads 1; .*train a new discriminator"):
        LeCam().load_state_dict({"version": 2})


def test_semantic_distillation_by_hand_and_without_gradient_for_the_teacher():
    features = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[1.0, 1.0], [1.0, 1.0]]], requires_grad=True)
    initial = torch.zeros(2, 2, 2, requires_grad=True)
    value = semantic_distillation(features, initial)
    assert value.tolist() == [1.25, 1.0]  # (1 + 4) / 4, 4 / 4
    value.sum().backward()
    assert initial.grad is None
    assert features.grad is not None and features.grad[0].tolist() == [[0.5, 0.0], [0.0, 1.0]]  # 2 f / 4


@pytest.mark.parametrize("objective", [discriminator_loss, semantic_distillation])
def test_bf16_is_compared_in_fp32(objective):
    generator = torch.Generator().manual_seed(1)
    pair = [torch.randn(2, 1, 4, 4, generator=generator).bfloat16() for _ in range(2)]
    value = objective(*pair)
    assert value.dtype == torch.float32 and torch.equal(value, objective(*(tensor.float() for tensor in pair)))
