"""Flow matching and self-alignment against numbers worked by hand."""

import math

import pytest
import torch

from spar_scale.objectives.flow_matching import drops_caption, noisy_latents, timesteps, velocity_error
from spar_scale.objectives.self_alignment import self_alignment


def logit(u: float) -> float:
    return math.log(u / (1 - u))


def test_timesteps_by_hand():
    # u = 0.5 -> place 500 -> 500; 0.0004 -> place 0 -> 1000; 0.2505 -> place 250 -> 750; 0.9995 -> place 999 -> 1
    draws = torch.tensor([0.0, logit(0.0004), logit(0.2505), logit(0.9995)])
    assert timesteps(draws).tolist() == [500, 1000, 750, 1]


def test_shifted_timesteps_by_hand():
    # shift 3: sigma 0.5 -> 1.5 / 2 = 0.75; 1 stays; 0.75 -> 2.25 / 2.5 = 0.9; 0.001 -> 0.003 / 1.002
    draws = torch.tensor([0.0, logit(0.0004), logit(0.2505), logit(0.9995)])
    torch.testing.assert_close(timesteps(draws, 3.0), torch.tensor([750.0, 1000.0, 900.0, 3 / 1.002]))


def test_timesteps_stay_in_the_table_at_any_draw():
    assert timesteps(torch.tensor([-200.0, 200.0])).tolist() == [1000, 1]  # sigmoid reaches 0 and 1 in fp32


def test_timesteps_are_logit_normal():
    """Quartiles of sigmoid(N(0, 1)): sigmoid(-0.6745) = 0.3375, 0.5, 0.6625, all times 1000."""
    draws = torch.randn(40_000, generator=torch.Generator().manual_seed(0))
    quartiles = timesteps(draws).quantile(torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(quartiles, torch.tensor([338.0, 500.0, 663.0]), atol=8, rtol=0)


def test_the_path_by_hand():
    # sigma 0.25: 0.75 * (4, 8) + 0.25 * (0, -4) = (3, 5); sigma 1 is the noise alone
    latents, noise = torch.tensor([[4.0, 8.0], [4.0, 8.0]]), torch.tensor([[0.0, -4.0], [2.0, 6.0]])
    assert noisy_latents(latents, noise, torch.tensor([250.0, 1000.0])).tolist() == [[3.0, 5.0], [2.0, 6.0]]


def test_the_velocity_is_the_derivative_of_the_path():
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(2))
    near, far = (noisy_latents(latents, noise, torch.full((2,), t)) for t in (200.0, 700.0))
    assert velocity_error((far - near) / 0.5, latents, noise).max() < 1e-10


def test_the_velocity_error_by_hand_is_per_sample():
    # targets eps - z: (0 - 1, 2 - 1) = (-1, 1) and (3, 3); errors (1, 0) -> 1/2 and (1, 3) -> 5
    latents, noise = torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([[0.0, 2.0], [3.0, 3.0]])
    prediction = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    assert velocity_error(prediction, latents, noise).tolist() == [0.5, 5.0]


def test_bf16_predictions_are_compared_in_fp32():
    prediction = torch.full((1, 3), 1.0, dtype=torch.bfloat16)
    error = velocity_error(prediction, torch.zeros(1, 3), torch.full((1, 3), 1.001))
    assert error.dtype == torch.float32
    assert error.item() == pytest.approx(1e-6, rel=1e-3)  # 1.001 rounds to 1 in bf16


def test_captions_are_dropped_below_the_rate():
    draws = torch.tensor([0.0, 0.0999, 0.1, 0.9])
    assert drops_caption(draws, 0.1).tolist() == [True, True, False, False]
    assert not drops_caption(draws, 0.0).any()


def test_self_alignment_by_hand():
    # cosines: (3, 4).(6, 8) -> 1, (1, 0).(0, 5) -> 0: mean 1/2; second sample -1 and (1, 1).(1, 0) = 0.7071
    student = torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[1.0, 0.0], [1.0, 1.0]]])
    teacher = torch.tensor([[[6.0, 8.0], [0.0, 5.0]], [[-2.0, 0.0], [1.0, 0.0]]])
    expected = torch.tensor([-0.5, (1 - 0.5**0.5) / 2])
    torch.testing.assert_close(self_alignment(student, teacher), expected)


def test_a_longer_teacher_is_averaged_along_its_raster():
    student = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    teacher = torch.tensor([[[1.0, 3.0], [7.0, 3.0], [0.0, 2.0], [0.0, 4.0]]])  # means (4, 3) and (0, 3)
    torch.testing.assert_close(self_alignment(student, teacher), torch.tensor([-(0.8 + 1) / 2]))


def test_the_teacher_gets_no_gradient_and_the_student_does():
    student = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    teacher = torch.ones(2, 3, 4, requires_grad=True)
    self_alignment(student, teacher).sum().backward()
    assert student.grad is not None and student.grad.abs().sum() > 0
    assert teacher.grad is None
