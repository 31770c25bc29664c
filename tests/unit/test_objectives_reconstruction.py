"""The reconstruction objectives against numbers worked by hand."""

import pytest
import torch

from spar_scale.objectives.reconstruction import gradient_difference, latent_power, mean_squared_error


def test_mean_squared_error_is_per_sample_and_a_mean_over_elements():
    prediction = torch.tensor([[[1.0, 3.0]], [[0.0, 0.0]]])
    target = torch.tensor([[[0.0, 1.0]], [[0.0, 2.0]]])
    assert mean_squared_error(prediction, target).tolist() == [2.5, 2.0]  # (1 + 4) / 2, (0 + 4) / 2


def test_gradient_difference_by_hand_at_one_scale():
    # difference image [[0, 2], [1, 1]]: along x |2|, |0|; along y |1|, |-1|; half a grey level off what is not 0
    prediction = torch.tensor([[[[0.0, 2.0], [1.0, 1.0]]]])
    value = gradient_difference(prediction, torch.zeros_like(prediction), scales=1)
    assert value.item() == pytest.approx(1 - 3 / 8 / 255, rel=1e-6)


def test_gradient_difference_by_hand_at_two_scales():
    # one column of 4 is brighter by 1: full size, along x |0,0,1| -> 1/3, along y 0 -> 1/6.
    # halved, the columns are 0 and 0.5: along x 0.5, along y 0 -> 1/4. Mean over scales 5/24, were
    # it not for half a grey level off each of the two differences.
    prediction = torch.zeros(1, 1, 4, 4)
    prediction[..., 3] = 1.0
    value = gradient_difference(prediction, torch.zeros_like(prediction), scales=2)
    off = 0.5 / 255
    assert value.item() == pytest.approx(((1 - off) / 6 + (0.5 - off) / 2) / 2, rel=1e-6)


def test_gradient_difference_is_quadratic_below_a_grey_level():
    prediction = torch.zeros(1, 1, 2, 2)
    prediction[..., 1] = 0.1 / 255  # along x a tenth of a grey level twice, along y nothing
    value = gradient_difference(prediction, torch.zeros_like(prediction), scales=1)
    assert value.item() == pytest.approx(0.5 * 0.1**2 / 255 / 2, rel=1e-5)


def test_gradient_difference_ignores_a_constant_shift_but_the_squared_error_does_not():
    image = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert gradient_difference(image + 0.25, image).abs().max() < 1e-6
    torch.testing.assert_close(mean_squared_error(image + 0.25, image), torch.full((2,), 0.0625))


def test_gradient_difference_refuses_images_too_small_for_its_scales():
    with pytest.raises(ValueError, match="too few for 3 scales"):
        gradient_difference(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), scales=3)


def test_latent_power_counts_only_what_exceeds_the_limit():
    latents = torch.tensor([[3.0, 1.0], [0.5, 0.5]])
    assert latent_power(latents).tolist() == [4.0, 0.0]  # (9 + 1) / 2 - 1, below the limit


@pytest.mark.parametrize("objective", [mean_squared_error, gradient_difference])
def test_bf16_inputs_are_compared_in_fp32(objective):
    generator = torch.Generator().manual_seed(1)
    prediction = torch.rand(2, 3, 8, 8, generator=generator).bfloat16()
    target = torch.rand(2, 3, 8, 8, generator=generator)
    value = objective(prediction, target)
    assert value.dtype == torch.float32
    assert torch.equal(value, objective(prediction.float(), target))
