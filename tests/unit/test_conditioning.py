"""A frozen prompt before trainable queries equals the library's full forward, in values and in gradients."""

import copy
import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2Model

import spar_scale.models.internvl.vision  # noqa: F401  registers the attention that is named "spar"
from parallel.program import Layer, Subprogram, run_layer
from spar_scale.models.blocks import positions
from spar_scale.models.initialise import initialise
from spar_scale.models.internvl.language import Rotary, causal_masks, extend_padding_mask
from spar_scale.models.internvl.layers import QueryPositions, decoding_layers, prompt_layers, query_layers
from spar_scale.models.spar.model import QueryEmbeddings

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


def layers_of(model: Qwen2Model, sampled: Sequence[int]) -> list[Layer]:
    """The layers behind the embedding, as a phase lists them."""
    prompt = prompt_layers(model, image_token_id=-1, features=None, frozen=True)[1:]
    pairs = zip(prompt, query_layers(model, sampled), strict=True)
    return [QueryPositions(Rotary(model.config), QUERIES), *itertools.chain.from_iterable(pairs)]


def states_of(model: Qwen2Model, prefix: Tensor, queries: Tensor, keep: Tensor, sampled: Sequence[int]):
    """Sampled hidden states of the prompt (B, K, P, D) and of the queries (B, K, Q, D)."""
    names = {kind: [f"{kind}_state_{index}" for index in sampled] for kind in ("prefix", "query")}
    program = Subprogram(layers_of(model, sampled), [*names["prefix"], *names["query"]])
    slots = program({"prefix_state_0": prefix, "queries": queries, "keep": keep})
    return tuple(torch.stack([slots[name] for name in names[kind]], dim=1) for kind in ("prefix", "query"))


@pytest.mark.parametrize("side", ["left", "right"])
def test_values_and_gradients_equal_the_full_pass(model, library, side):
    keep, sampled = keep_of(side), tuple(range(1, LAYERS + 1))
    prefix, queries = embeddings()
    mine = states_of(model, prefix, queries, keep, sampled)[1]
    twin = queries.detach().clone().requires_grad_()
    full = torch.stack(full_pass(library, prefix, twin, keep)[1:], dim=1)
    torch.testing.assert_close(mine, full, atol=1e-5, rtol=1e-5)
    for index in range(LAYERS):
        direction = torch.randn(full[:, index].shape, generator=torch.Generator().manual_seed(index))
        (gradient,) = torch.autograd.grad((mine[:, index] * direction).sum(), queries, retain_graph=True)
        (expected,) = torch.autograd.grad((full[:, index] * direction).sum(), twin, retain_graph=True)
        assert (gradient - expected).abs().max() <= 1e-5 * expected.abs().max(), index


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_library_batched_and_padded_gives_the_same_prefix_and_queries(model, library, side):
    keep = keep_of(side)
    prefix, queries = embeddings()
    states = torch.cat(states_of(model, prefix, queries, keep, (2, LAYERS)), dim=2)
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
    one, two = (states_of(model, p, queries, keep, (LAYERS,))[1] for p in (prefix, other))
    assert torch.equal(one, two)


def test_the_prefix_comes_out_without_gradient_and_the_queries_with(model):
    prefix, queries = embeddings()
    prefix.requires_grad_()  # as it arrives from a pipeline stage that trained the embeddings
    of_prefix, of_queries = states_of(model, prefix, queries, keep_of("left"), (1, LAYERS))
    assert not of_prefix.requires_grad
    assert torch.autograd.grad(of_queries.sum(), prefix, allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.grad(of_queries.square().sum(), queries)[0].abs().max() > 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_queries_on_stored_states_are_bit_equal_to_those_behind_the_prompt(model, side):
    """What `data.encoded` stores are the prompt's states; the rest of the list reads them instead of computing them."""
    keep, sampled = keep_of(side), (1, LAYERS)
    prefix, queries = embeddings()
    stored = {"prefix_state_0": prefix}
    wanted = [f"prefix_state_{index}" for index in range(1, LAYERS + 1)]
    stored |= Subprogram(layers_of(model, sampled), wanted)({"prefix_state_0": prefix, "keep": keep})
    rest = Subprogram(layers_of(model, sampled), [f"query_state_{k}" for k in sampled], given=stored)
    assert not any("prefix_state" in name for layer in rest.layers for name in layer.writes)
    twin = queries.detach().clone().requires_grad_()
    slots = rest({**stored, "queries": twin, "keep": keep})
    whole = states_of(model, prefix, queries, keep, sampled)[1]
    halves = torch.stack([slots[f"query_state_{k}"] for k in sampled], dim=1)
    assert torch.equal(halves, whole)
    (gradient,) = torch.autograd.grad(halves.square().sum(), twin)
    assert torch.equal(gradient, torch.autograd.grad(whole.square().sum(), queries)[0])


def test_a_recomputed_list_has_the_same_gradients_and_runs_the_prompt_once(model, monkeypatch):
    keep, gradients, runs = keep_of("right"), [], []
    calls = [0]
    forward = type(model.layers[0].mlp).forward

    def counted(module, hidden):
        calls[0] += hidden.shape[1] == PREFIX
        return forward(module, hidden)

    monkeypatch.setattr(type(model.layers[0].mlp), "forward", counted)
    for recompute in (False, True):
        prefix, queries = embeddings()
        layers, calls[0] = layers_of(model, (LAYERS,)), 0
        live = {"prefix_state_0": prefix, "queries": queries, "keep": keep}
        for layer in layers:
            live |= run_layer(layer, live, [*live, *layer.writes], recompute)
        gradients += torch.autograd.grad(live[f"query_state_{LAYERS}"].square().sum(), queries)
        runs.append(calls[0])
    assert torch.equal(gradients[0], gradients[1])
    assert runs == [LAYERS, LAYERS]


def test_decoding_with_kept_keys_and_values_equals_the_library(model, library):
    """Each further token alone, past the keys and values of those before it."""
    head = torch.nn.Linear(WIDTH, 50, bias=False).requires_grad_(False)
    tokens = torch.tensor([[3, 7, 11, 2, 30, 4, 9]])
    start = 3
    kept = [f"prefix_{kind}_{index}" for index in range(1, LAYERS + 1) for kind in ("keys", "values")]
    prompt = [QueryPositions(Rotary(model.config), 0), *prompt_layers(model, -1, None, frozen=True)]
    keep = torch.ones(1, start, dtype=torch.uint8)
    slots = Subprogram(prompt, kept)({"tokens": tokens[:, :start], "keep": keep})
    step = Subprogram(decoding_layers(model, head, Rotary(model.config)), ("logits", *kept))
    whole = head(library(input_ids=tokens, use_cache=False).last_hidden_state)
    for place in range(start, tokens.shape[1]):
        slots = step({**slots, "token": tokens[:, place : place + 1], "position": torch.tensor([place])})
        torch.testing.assert_close(slots["logits"][:, 0], whole[:, place], atol=1e-5, rtol=1e-5)


def test_masks_by_hand():
    prefix, queries = causal_masks(torch.tensor([[0, 1, 1]]), num_queries=2)
    assert prefix[0, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]  # padding reads itself alone
    assert queries[0, 0].int().tolist() == [[0, 1, 1, 1, 0], [0, 1, 1, 1, 1]]
    assert positions(torch.tensor([[0, 1, 1, 0, 1]])).tolist() == [[0, 0, 1, 1, 2]]


def test_rotary_angles_are_fp32_and_have_values_also_for_a_model_without_them(model):
    places = torch.tensor([[0, 1000]])
    cos, _ = Rotary(model.config)(places)
    head_width = WIDTH // 4
    frequency = model.config.rope_parameters["rope_theta"] ** -(torch.arange(0, head_width, 2) / head_width)
    assert cos.dtype == torch.float32
    torch.testing.assert_close(cos[0, 1, : head_width // 2], (1000 * frequency).cos(), atol=1e-4, rtol=0)
    with torch.device("meta"):
        assert Rotary(model.config)(places)[0].device.type == "cpu"


def test_a_layer_of_another_model_is_refused(model):
    other = copy.deepcopy(model)
    other.layers[1] = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="Linear is not a Qwen2DecoderLayer"):
        query_layers(other, ())


def test_a_model_with_sliding_window_attention_is_refused():
    config = Qwen2Config(
        vocab_size=8, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=8, use_sliding_window=True, sliding_window=4, max_window_layers=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="sliding-window attention"):
        prompt_layers(Qwen2Model(config), -1, None, frozen=True)


def test_queries_start_standard_normal_and_are_shared_by_the_batch():
    queries = QueryEmbeddings(64, 64)
    initialise(queries, seed=0)
    out = queries(3)
    assert out.shape == (3, 64, 64) and torch.equal(out[0], out[2])
    assert out[0].std().item() == pytest.approx(1, rel=0.03) and abs(out[0].mean().item()) < 0.05
