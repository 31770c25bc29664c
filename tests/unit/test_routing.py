"""Dynamic Token Routing against numbers worked by hand."""

import math

import pytest
import torch

from spar_scale.models.initialise import initialise
from spar_scale.models.spar.routing import TokenRouting, sampled_states


def built(**options) -> TokenRouting:
    routing = TokenRouting(width=8, num_layers=8, num_states=4, **options)
    initialise(routing, seed=0)
    return routing


def states(num_states: int = 4) -> torch.Tensor:
    return torch.randn(num_states, 10, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("layers", "sampled", "expected"),
    [
        (24, 4, (6, 12, 18, 24)),  # SPAR-1B
        (28, 4, (7, 14, 21, 28)),  # SPAR-3B
        (24, 6, (4, 8, 12, 16, 20, 24)),
        (26, 4, (6, 12, 18, 26)),  # floor(26 / 4) = 6, the last forced to 26
        (4, 4, (1, 2, 3, 4)),
        (5, 1, (5,)),
    ],
)
def test_states_are_sampled_at_a_fixed_interval_and_the_last_is_forced(layers, sampled, expected):
    assert sampled_states(layers, sampled) == expected


@pytest.mark.parametrize("sampled", [0, 9])
def test_an_impossible_number_of_states_is_refused(sampled):
    with pytest.raises(ValueError, match=f"{sampled} hidden states cannot be sampled from 8 layers"):
        sampled_states(8, sampled)


def test_an_unknown_routing_is_refused():
    with pytest.raises(ValueError, match="routing 'first' is not one of dynamic, uniform, last_layer"):
        TokenRouting(8, 8, 4, kind="first")  # pyright: ignore[reportArgumentType]


def test_routed_tokens_by_hand():
    # D = 2, K = 2, one token: H_1 = (1, 3), H_2 = (2, 0). The gate reads H_2: its first layer (D/2 = 1)
    # gives 0.5 * 2 = 1, SiLU(1) = s, its second layer logits (s ln 3 / s, 0) / tau = (ln 3, 0) -> (3/4, 1/4).
    # alpha = (2, 4): 1.5 H_1 + 1 H_2 = (3.5, 4.5); LN -> (-1, 1); W_p = [[1, 2], [3, 4]], b = (10, 20).
    routing = TokenRouting(width=2, num_layers=2, num_states=2, temperature=2.0)
    silu = 1 / (1 + math.exp(-1))
    values = {
        "gate.0.weight": [[0.5, 7.0]],
        "gate.0.bias": [0.0],
        "gate.2.weight": [[2 * math.log(3) / silu], [0.0]],
        "gate.2.bias": [0.0, 0.0],
        "scales": [2.0, 4.0],
        "norm.weight": [1.0, 1.0],
        "norm.bias": [0.0, 0.0],
        "projection.weight": [[1.0, 2.0], [3.0, 4.0]],
        "projection.bias": [10.0, 20.0],
    }
    routing.load_state_dict({name: torch.tensor(value) for name, value in values.items()}, strict=True)
    hidden = torch.tensor([[[1.0, 3.0]], [[2.0, 0.0]]])  # (K, N, D)
    routed, weights = routing(hidden)
    torch.testing.assert_close(weights, torch.tensor([[0.75, 0.25]]))
    torch.testing.assert_close(routed, torch.tensor([[11.0, 21.0]]), rtol=1e-4, atol=0)


def test_weights_sum_to_one_per_token_and_differ_between_tokens():
    weights = built().weights(states())
    assert weights.shape == (10, 4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(10))
    assert (weights.std(dim=0) > 1e-3).all()


def test_a_low_temperature_sharpens_the_choice():
    mild, sharp = built(), built(temperature=0.01)
    assert sharp.weights(states()).amax(-1).mean() > 0.9 > 0.5 > mild.weights(states()).amax(-1).mean()


def test_every_parameter_of_each_kind_is_trained():
    for kind in ("dynamic", "uniform", "last_layer"):
        routing = built(kind=kind)
        routing(states(len(routing.sampled)))[0].square().sum().backward()
        for name, parameter in routing.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, (kind, name)


def test_uniform_is_the_mean_of_all_states():
    routing, hidden = built(kind="uniform"), states()
    assert routing.sampled == (2, 4, 6, 8) and routing.gate is None
    expected = routing.projection(routing.norm(hidden.mean(dim=0)))
    routed, weights = routing(hidden)
    torch.testing.assert_close(routed, expected)
    assert (weights == 0.25).all()


def test_last_layer_reads_hidden_state_l_alone():
    routing, hidden = built(kind="last_layer"), states(1)
    assert routing.sampled == (8,) and routing.gate is None
    routed, weights = routing(hidden)
    torch.testing.assert_close(routed, routing.projection(routing.norm(hidden[0])))
    assert (weights == 1).all()


def test_scales_start_at_one_and_the_published_size_is_right():
    assert (built().scales == 1).all()
    with torch.device("meta"):
        routing = TokenRouting(width=896, num_layers=24, num_states=4)
    # gate 896 * 448 + 448 and 448 * 4 + 4, alpha 4, LN 2 * 896, W_p 896 * 896 + 896
    assert sum(p.numel() for p in routing.parameters()) == 401856 + 1796 + 4 + 1792 + 803712


def test_weights_in_bf16_still_sum_to_one_in_fp32():
    weights = built().bfloat16().weights(states().bfloat16())
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(10))
