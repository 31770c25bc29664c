"""The discriminator: its shapes, its blur by hand, and that it can tell two kinds of picture apart."""

import pytest
import torch
from torch import nn

from spar_scale.models.dual_stream import build_discriminator
from spar_scale.models.dual_stream.discriminator import BlurDownsample
from spar_scale.models.initialise import initialise
from spar_scale.models.presets import PRESETS, Preset
from spar_scale.objectives.adversarial import discriminator_loss, generator_loss

TINY = PRESETS["tiny"]


def built(preset: Preset) -> nn.Module:
    return build_discriminator(preset.autoencoder, preset.image_size)


@pytest.fixture
def discriminator():
    model = built(TINY)
    initialise(model, seed=0)
    return model


def widths(model):
    return [m.out_channels for m in model.get_submodule("stages").modules() if isinstance(m, nn.Conv2d)]


def test_logits_of_the_tiny_preset(discriminator):
    assert discriminator(torch.rand(2, 3, 32, 32)).shape == (2, 1, 4, 4)
    assert widths(discriminator) == [12, 24, 48]


def test_the_published_size_follows_from_the_published_autoencoder():
    with torch.device("meta"):
        model = built(PRESETS["spar_1b"])
        assert model(torch.rand(1, 3, 448, 448)).shape == (1, 1, 16, 16)
    assert widths(model) == [128, 256, 512]
    assert [m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)] == [32, 32, 32]
    convolutions = 5 * 5 * 3 * 128 + 9 * (128 * 128 + 128 * 256 + 256 * 512) + 512 * 512 + 25 * 512
    vectors = 128 + 3 * (128 + 256 + 512) + 512 + 1  # biases; weight and bias of the norms
    assert sum(parameter.numel() for parameter in model.parameters()) == convolutions + vectors


def test_the_blur_by_hand():
    # a single bright point at row 1, column 2 of 4 x 4: the window of output (r, c) starts at (2r - 1, 2c - 1),
    # so output (0, 0) sees the point at tap (2, 3), (0, 1) at (2, 1), (1, 0) at (0, 3), (1, 1) at (0, 1)
    image = torch.zeros(1, 2, 4, 4)
    image[0, 1, 1, 2] = 64.0
    blurred = BlurDownsample()(image)
    assert blurred[0].tolist() == [[[0.0, 0.0], [0.0, 0.0]], [[3.0, 9.0], [1.0, 3.0]]]


def test_a_constant_keeps_its_value_away_from_the_edge():
    assert BlurDownsample()(torch.full((1, 1, 8, 8), 2.0))[0, 0, 1:-1, 1:-1].unique().tolist() == [2.0]


def test_a_samples_logits_do_not_depend_on_the_others(discriminator):
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(discriminator(images)[:1], discriminator(images[:1]), rtol=1e-5, atol=1e-6)


def test_its_weights_depend_on_the_seed_alone(discriminator):
    again, other = built(TINY), built(TINY)
    initialise(again, seed=0)
    initialise(other, seed=1)
    weight = discriminator.logits.weight
    assert torch.equal(again.get_parameter("logits.weight"), weight)
    assert not torch.equal(other.get_parameter("logits.weight"), weight)
    assert set(discriminator.state_dict()) == {name for name, _ in discriminator.named_parameters()}


def test_a_few_steps_tell_edges_from_blur_and_show_the_generator_the_way(discriminator):
    generator = torch.Generator().manual_seed(0)
    real = torch.rand(8, 3, 32, 32, generator=generator)
    fake = torch.nn.functional.avg_pool2d(real, 3, stride=1, padding=1).requires_grad_()
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=2e-3)
    for _ in range(15):
        loss = discriminator_loss(discriminator(real), discriminator(fake.detach())).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    before = generator_loss(discriminator(fake))
    assert (discriminator(real).mean((1, 2, 3)) > -before).all()
    (gradient,) = torch.autograd.grad(before.sum(), fake)
    after = generator_loss(discriminator(fake - 0.05 * gradient.sign()))
    assert (after < before).all()
