"""The sampler on velocity fields whose answer is known, and guidance by hand."""

import itertools

import pytest
import torch

from spar_scale.inference.sampler import sample, seeded_noise

SHAPE = (2, 3, 4)
NOTHING = torch.zeros(2, 1), torch.tensor([0, 1, 2])


class Point:
    """All data is one point: x = (1 - s) z + s eps, so the velocity is (x - z) / s."""

    def __init__(self, point):
        self.point = point

    def velocity(self, latents, timestep, captions, bounds):
        return (latents - self.point) / (timestep / 1000).view(-1, 1, 1, 1)


class Gaussian:
    """Data is normal with a mean and a deviation; the flow carries x_s - (1 - s) mean along its own deviation."""

    mean, deviation = 0.7, 0.4

    def velocity(self, latents, timestep, captions, bounds):
        s = (timestep / 1000).view(-1, 1, 1, 1)
        from_mean = latents - (1 - s) * self.mean
        variance = (1 - s) ** 2 * self.deviation**2 + s**2
        clean = self.mean + self.deviation**2 * (1 - s) / variance * from_mean
        return (latents - clean) / s

    def answer(self, noise):
        s = 0.999
        return (
            self.mean
            + self.deviation * (noise - (1 - s) * self.mean) / ((1 - s) ** 2 * self.deviation**2 + s**2) ** 0.5
        )


class Captioned:
    """The velocity is the sum of a sample's captions."""

    def __init__(self):
        self.batches = []

    def velocity(self, latents, timestep, captions, bounds):
        self.batches.append(len(latents))
        assert len(timestep) == len(bounds) - 1 == len(latents)
        sums = [captions[first:end].sum() for first, end in itertools.pairwise(bounds.tolist())]
        return torch.stack(sums).view(-1, 1, 1, 1).expand_as(latents)


def drawn(model, steps=8, guidance=1.0, flow_shift=1.0, noise=None):
    noise = seeded_noise(SHAPE, [0, 1]) if noise is None else noise
    return sample(model, *NOTHING, noise, steps, guidance, flow_shift)


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 1000])
@pytest.mark.parametrize("flow_shift", [1.0, 3.0])
def test_one_point_is_reached_in_any_number_of_steps(steps, flow_shift):
    if steps == 1000 and flow_shift == 3.0:
        steps = 100
    point = torch.linspace(-1, 1, 24).view(SHAPE)
    torch.testing.assert_close(
        drawn(Point(point), steps, 1.0, flow_shift), point.expand(2, -1, -1, -1), atol=2e-5, rtol=0
    )


@pytest.mark.parametrize("flow_shift", [1.0, 3.0])
def test_a_gaussian_is_reached_to_second_order(flow_shift):
    noise, model = seeded_noise(SHAPE, [0, 1]), Gaussian()
    answer = model.answer(noise)
    errors = [(drawn(model, n, 1.0, flow_shift, noise) - answer).abs().max().item() for n in (20, 160, 320)]
    assert errors[0] < 0.1 and errors[2] < 0.001
    assert errors[1] > 3 * errors[2]


def test_the_model_is_asked_at_a_thousand_sigma_under_the_shift():
    asked = []

    class Asked:
        def velocity(self, latents, timestep, captions, bounds):
            asked.append(timestep[0].item())
            return latents

    drawn(Asked(), 4, 1.0, 1.0)
    drawn(Asked(), 4, 1.0, 3.0)
    even = [0.999 * part for part in (1, 0.75, 0.5, 0.25)]
    shifted = [3 * sigma / (1 + 2 * sigma) for sigma in even]
    assert asked == pytest.approx([1000 * sigma for sigma in even + shifted], abs=1e-3)


def test_guidance_departs_from_the_bare_velocity():
    model, noise = Captioned(), torch.zeros(2, *SHAPE)
    captions, bounds = torch.tensor([[2.0], [3.0]]), torch.tensor([0, 1, 2])
    bare = torch.tensor([[0.5], [0.25], [0.5], [0.25]])  # longer
    guided = sample(model, torch.cat([captions, bare]), torch.tensor([0, 1, 2, 4, 6]), noise, 1, 2.5, 1.0)
    expected = [-0.999 * (0.75 + 2.5 * (given - 0.75)) for given in (2.0, 3.0)]  # one step: x - sigma v
    assert guided[:, 0, 0, 0].tolist() == pytest.approx(expected, rel=1e-5)
    assert model.batches == [4]
    alone = sample(model, captions, bounds, noise, 1, 1.0, 1.0)
    assert alone[:, 0, 0, 0].tolist() == pytest.approx([-0.999 * 2, -0.999 * 3], rel=1e-5)
    assert model.batches == [4, 2]


def test_noise_depends_on_its_own_seed_alone():
    both = seeded_noise(SHAPE, [3, 4])
    assert torch.equal(both[1:], seeded_noise(SHAPE, [4])) and not torch.equal(both[0], both[1])


@pytest.mark.parametrize("steps", [0, 1001])
def test_a_number_of_steps_that_cannot_be_taken_is_refused(steps):
    with pytest.raises(ValueError, match="1 to 1000 can be taken"):
        drawn(Point(0.0), steps)
