"""Frozen-prefix conditioning equals the full pass, in values and in gradients to the queries."""

import copy

import pytest
import spar_scale.models.vision  # noqa: F401  registers the attention that is named "spar"
import torch
from spar_scale.models.conditioning import (
    QueryEmbeddings,
    Rotary,
    causal_masks,
    conditioned_layer,
    extend_padding_mask,
    final_state,
    positions,
    prefix_layer,
    query_layer,
    sampled_hidden_states,
)
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2Config, Qwen2Model

from spar_scale.models.initialise import initialise

PREFIX, QUERIES, WIDTH, LAYERS = 7, 4, 32, 4
LENGTHS = (7, 3, 1)


@pytest.fixture(scope="module")
def model() -> Qwen2Model:
    config = Qwen2Config(
        vocab_size=50, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    built = Qwen2Model(config)
    built.set_attn_implementation("spar")
    initialise(built, seed=0)
    with torch.no_grad():
        built.norm.weight.mul_(3)  # so that a state before the norm cannot pass for one after it
        for layer in built.layers:
            for name, parameter in layer.named_parameters():
                if name.endswith("weight") and parameter.ndim == 2:
                    parameter.mul_(5)  # attention that is far from uniform
    return built.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def library(model) -> Qwen2Model:
    """The same weights under transformers' own attention and masks."""
    library = copy.deepcopy(model)
    library.set_attn_implementation("sdpa")
    return library


def keep_of(side: str) -> torch.Tensor:
    keep = torch.zeros(len(LENGTHS), PREFIX, dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        keep[row, slice(0, length) if side == "right" else slice(PREFIX - length, PREFIX)] = 1
    return keep


def embeddings() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    prefix = torch.randn(len(LENGTHS), PREFIX, WIDTH, generator=generator)
    return prefix, torch.randn(len(LENGTHS), QUERIES, WIDTH, generator=generator).requires_grad_()


def full_pass(library, prefix, queries, keep) -> tuple[torch.Tensor, ...]:
    """The library's own forward over the whole sequence, on one sample at a time and without any padding."""
    rows = []
    for row in range(len(prefix)):
        real = prefix[row][keep[row].bool()]
        sequence = torch.cat([real, queries[row]])[None]
        rows.append(library(inputs_embeds=sequence, output_hidden_states=True, use_cache=False).hidden_states)
    return tuple(torch.stack([row[index][0, -QUERIES:] for row in rows]) for index in range(LAYERS + 1))


@pytest.mark.parametrize("side", ["left", "right"])
def test_values_and_gradients_equal_the_full_pass(model, library, side):
    keep, sampled = keep_of(side), tuple(range(LAYERS + 1))
    prefix, queries = embeddings()
    mine = sampled_hidden_states(model, prefix, queries, keep, sampled)[1]
    twin = queries.detach().clone().requires_grad_()
    full = torch.stack(full_pass(library, prefix, twin, keep), dim=1)
    torch.testing.assert_close(mine, full, atol=1e-5, rtol=1e-5)
    for index in sampled[1:]:
        direction = torch.randn(full[:, index].shape, generator=torch.Generator().manual_seed(index))
        (gradient,) = torch.autograd.grad((mine[:, index] * direction).sum(), queries, retain_graph=True)
        (expected,) = torch.autograd.grad((full[:, index] * direction).sum(), twin, retain_graph=True)
        assert (gradient - expected).abs().max() <= 1e-5 * expected.abs().max(), index


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_library_batched_and_padded_says_the_same_of_prefix_and_queries(model, library, side):
    keep = keep_of(side)
    prefix, queries = embeddings()
    states = torch.cat(sampled_hidden_states(model, prefix, queries, keep, (2, LAYERS)), dim=2)
    whole = extend_padding_mask(keep, QUERIES)
    batched = library(
        inputs_embeds=torch.cat([prefix, queries], dim=1), attention_mask=whole, position_ids=positions(whole),
        output_hidden_states=True, use_cache=False,
    ).hidden_states  # fmt: skip
    for mine, full in zip(states.unbind(1), (batched[2], batched[LAYERS]), strict=True):
        torch.testing.assert_close(mine[whole.bool()], full[whole.bool()], atol=1e-5, rtol=1e-5)
    assert states.isfinite().all()


def test_what_stands_in_the_padding_changes_nothing(model):
    keep = keep_of("right")
    prefix, queries = embeddings()
    other = torch.where(keep.bool()[..., None], prefix, torch.full_like(prefix, 9.0))
    one, two = (sampled_hidden_states(model, p, queries, keep, (LAYERS,))[1] for p in (prefix, other))
    assert torch.equal(one, two)


def test_the_prefix_comes_out_without_gradient_and_the_queries_with(model):
    prefix, queries = embeddings()
    prefix.requires_grad_()  # as it arrives from a stage that trained the embeddings
    keep = keep_of("left")
    pairs = [
        conditioned_layer(model.layers[0], Rotary(model.config), prefix, queries, keep),
        final_state(model.norm, prefix, queries),
        sampled_hidden_states(model, prefix, queries, keep, (0, LAYERS)),
    ]
    assert [(before.requires_grad, after.requires_grad) for before, after in pairs] == [(False, True)] * 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_halves_are_bit_equal_to_the_whole(model, side):
    rotary, keep, layer = Rotary(model.config), keep_of(side), model.layers[2]
    prefix, queries = embeddings()
    twin = queries.detach().clone().requires_grad_()
    whole = conditioned_layer(layer, rotary, prefix, queries, keep)
    halves = prefix_layer(layer, rotary, prefix, keep), query_layer(layer, rotary, prefix, twin, keep)
    assert all(torch.equal(one, other) for one, other in zip(whole, halves, strict=True))
    (gradient,) = torch.autograd.grad(halves[1].square().sum(), twin)
    assert torch.equal(gradient, torch.autograd.grad(whole[1].square().sum(), queries)[0])


def test_a_layer_recomputed_as_one_block_has_the_same_gradients(model):
    rotary, keep = Rotary(model.config), keep_of("right")
    gradients = []
    for recompute in (False, True):
        prefix, queries = embeddings()
        arguments = (model.layers[0], rotary, prefix, queries, keep)
        if recompute:
            out = checkpoint(conditioned_layer, *arguments, use_reentrant=False)
        else:
            out = conditioned_layer(*arguments)
        assert isinstance(out, tuple)
        gradients += torch.autograd.grad(out[1].square().sum(), queries)
    assert torch.equal(gradients[0], gradients[1])


def test_masks_by_hand():
    prefix, queries = causal_masks(torch.tensor([[0, 1, 1]]), num_queries=2)
    assert prefix[0, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]  # padding sees itself alone
    assert queries[0, 0].int().tolist() == [[0, 1, 1, 1, 0], [0, 1, 1, 1, 1]]
    assert positions(torch.tensor([[0, 1, 1, 0, 1]])).tolist() == [[0, 0, 1, 1, 2]]


def test_rotary_positions_stay_in_fp32_when_the_model_goes_to_bf16(model):
    rotary, places = Rotary(model.config), torch.tensor([[0, 1000]])
    cos, sin = rotary(torch.zeros(1, 2, WIDTH), places)
    low = rotary(torch.zeros(1, 2, WIDTH, dtype=torch.bfloat16), places)
    assert torch.equal(low[0], cos.bfloat16()) and torch.equal(low[1], sin.bfloat16())
    with torch.device("meta"):
        assert Rotary(model.config)(torch.zeros(1, device="cpu"), places)[0].device.type == "cpu"


def test_a_layer_of_another_model_is_refused(model):
    prefix, queries = embeddings()
    with pytest.raises(TypeError, match="Linear is not a Qwen2DecoderLayer"):
        conditioned_layer(torch.nn.Linear(2, 2), Rotary(model.config), prefix, queries, keep_of("left"))


@pytest.mark.parametrize(
    ("backend", "change", "message"),
    [
        ("eager", {}, "attention 'eager' does not read a boolean mask"),
        ("sdpa", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}, "sliding-window attention"),
        ("spar", {}, "gradient checkpointing drops the cache"),
    ],
)
def test_a_layer_that_would_be_silently_wrong_is_refused(backend, change, message):
    config = Qwen2Config(
        vocab_size=8, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=8, **change,
    )  # fmt: skip
    small = Qwen2Model(config).train()
    small.set_attn_implementation(backend)
    setattr(small.layers[0], "gradient_checkpointing", backend == "spar" and not change)  # noqa: B010
    prefix, queries = embeddings()
    with pytest.raises(ValueError, match=message):
        conditioned_layer(small.layers[0], Rotary(small.config), prefix, queries, keep_of("left"))


def test_queries_start_standard_normal_and_are_shared_by_the_batch():
    queries = QueryEmbeddings(64, 64)
    initialise(queries, seed=0)
    out = queries(3)
    assert out.shape == (3, 64, 64) and torch.equal(out[0], out[2])
    assert out[0].std().item() == pytest.approx(1, rel=0.03) and abs(out[0].mean().item()) < 0.05
