"""Initial weights depend on module name and seed only."""

from typing import Any

import pytest
import torch
from torch import nn

from spar_scale.models.initialise import initialise
from spar_scale.models.presets import PRESETS

TINY: Any = PRESETS["tiny"]


class TwoParts(nn.Module):
    def __init__(self, names):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Sequential(nn.Linear(4, 3), nn.Conv2d(3, 2, 1)))


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3))


def new_tokenizer() -> nn.Module:
    return TINY.tokenizer.build(TINY.vision, TINY.autoencoder, pixel_encoder=True)


@pytest.fixture(scope="module")
def tokenizer():
    model = new_tokenizer()
    initialise(model, seed=0)
    return model


def test_order_of_construction_and_parts_left_out_change_nothing():
    models = [TwoParts(names) for names in (["a", "b"], ["b", "a"], ["b"])]
    for model in models:
        initialise(model, seed=3)
    first = models[0].state_dict()
    for model in models[1:]:
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, first[name]), name
    assert not torch.equal(first["a.0.weight"], first["b.0.weight"])


def test_the_seed_changes_random_weights_and_the_global_generator_stays():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two = TwoParts(["a"]), TwoParts(["a"])
    torch.set_rng_state(before)
    initialise(one, seed=0)
    initialise(two, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(one.get_parameter("a.0.weight"), two.get_parameter("a.0.weight"))


def test_two_builds_of_the_tokenizer_are_equal_whatever_the_global_generator(tokenizer):
    torch.manual_seed(99)
    again = new_tokenizer()
    initialise(again, seed=0)
    for (name, weight), other in zip(tokenizer.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(weight, other), name


def test_no_two_random_weights_of_the_tokenizer_are_alike(tokenizer):
    """Also transformer layers of one stream: each name has a generator of its own."""
    seen = {}
    for name, weight in tokenizer.named_parameters():
        if weight.ndim > 1 and weight.std() > 0:
            twin = seen.setdefault(weight.detach().flatten()[:16].numpy().tobytes(), name)
            assert twin == name


def test_streams_start_as_the_paper_says(tokenizer):
    stream = tokenizer.pixel_stream
    weights = torch.cat([m.weight.flatten() for m in stream.modules() if isinstance(m, nn.Linear)])
    assert weights.std().item() == pytest.approx(0.02, rel=0.02)
    assert all((m.bias == 0).all() for m in stream.modules() if isinstance(m, nn.Linear))
    assert all((m.weight == 1).all() for m in stream.modules() if isinstance(m, nn.LayerNorm))


def test_a_module_without_a_rule_is_an_error_that_names_its_class():
    model = nn.Sequential(nn.Linear(2, 2), Unknown())
    with pytest.raises(TypeError, match=r"Unknown \(1: \['scale'\]\)"):
        initialise(model, seed=0)


def test_no_batch_statistics_and_no_dropout_anywhere(tokenizer):
    for name, module in tokenizer.named_modules():
        assert not isinstance(module, nn.modules.batchnorm._BatchNorm), name
        assert not isinstance(module, nn.Dropout) or module.p == 0, name
    assert list(tokenizer.buffers()) == []
