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
from spar_scale.models.initialise import initialise
from spar_scale.models.internvl.language import Rotary
from spar_scale.models.internvl.layers import (
    PromptPositions,
    QueryPositions,
    decoding_layers,
    prompt_layers,
    query_layers,
)
from spar_scale.models.spar.layers import CaptionBounds, CaptionOrder
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


def embeddings() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    prefix = torch.randn(sum(LENGTHS), WIDTH, generator=generator)
    return prefix, torch.randn(len(LENGTHS), QUERIES, WIDTH, generator=generator).requires_grad_()


def prompts_of(prefix: Tensor) -> dict[str, Tensor]:
    """The slots of prompts that are given by their embeddings; only the number of tokens is read."""
    return {
        "prefix_state_0": prefix,
        "tokens": torch.zeros(len(prefix), dtype=torch.int64),
        "lengths": torch.tensor(LENGTHS),
    }


def full_pass(library, prefix, queries) -> tuple[torch.Tensor, ...]:
    """The library's own forward over the whole sequence, one sample at a time."""
    rows = []
    for prompt, of_sample in zip(prefix.split(LENGTHS), queries, strict=True):
        sequence = torch.cat([prompt, of_sample])[None]
        rows.append(library(inputs_embeds=sequence, output_hidden_states=True, use_cache=False).hidden_states)
    return tuple(torch.stack([row[index][0, -QUERIES:] for row in rows]) for index in range(LAYERS + 1))


def layers_of(model: Qwen2Model, sampled: Sequence[int]) -> list[Layer]:
    """The layers behind the embedding, as a phase lists them."""
    longest = PREFIX + QUERIES
    prompt = prompt_layers(model, image_token_id=-1, features=None, longest=longest, frozen=True)[1:]
    pairs = zip(prompt, query_layers(model, sampled, longest), strict=True)
    positions = [CaptionBounds(QUERIES), CaptionOrder(QUERIES), QueryPositions(Rotary(model.config), QUERIES)]
    return [*positions, *itertools.chain.from_iterable(pairs)]


def states_of(model: Qwen2Model, prefix: Tensor, queries: Tensor, sampled: Sequence[int]):
    """Sampled hidden states of the prompts (T, K, D) and of the queries (B, K, Q, D)."""
    names = {kind: [f"{kind}_state_{index}" for index in sampled] for kind in ("prefix", "query")}
    program = Subprogram(layers_of(model, sampled), [*names["prefix"], *names["query"]])
    slots = program({**prompts_of(prefix), "queries": queries})
    return tuple(torch.stack([slots[name] for name in names[kind]], dim=1) for kind in ("prefix", "query"))


def test_values_and_gradients_equal_the_full_pass(model, library):
    sampled = tuple(range(1, LAYERS + 1))
    prefix, queries = embeddings()
    mine = states_of(model, prefix, queries, sampled)[1]
    twin = queries.detach().clone().requires_grad_()
    full = torch.stack(full_pass(library, prefix, twin)[1:], dim=1)
    torch.testing.assert_close(mine, full, atol=1e-5, rtol=1e-5)
    for index in range(LAYERS):
        direction = torch.randn(full[:, index].shape, generator=torch.Generator().manual_seed(index))
        (gradient,) = torch.autograd.grad((mine[:, index] * direction).sum(), queries, retain_graph=True)
        (expected,) = torch.autograd.grad((full[:, index] * direction).sum(), twin, retain_graph=True)
        assert (gradient - expected).abs().max() <= 1e-5 * expected.abs().max(), index


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_library_batched_and_padded_gives_the_same_prefix_and_queries(model, library, side):
    prefix, queries = embeddings()
    of_prompts, of_queries = states_of(model, prefix, queries, (2, LAYERS))
    padded, mask = torch.zeros(len(LENGTHS), PREFIX, WIDTH), torch.zeros(len(LENGTHS), PREFIX, dtype=torch.int64)
    for row, prompt in enumerate(prefix.split(LENGTHS)):
        place = slice(0, len(prompt)) if side == "right" else slice(PREFIX - len(prompt), PREFIX)
        padded[row, place], mask[row, place] = prompt, 1
    whole = torch.cat([mask, torch.ones(len(LENGTHS), QUERIES, dtype=torch.int64)], dim=1)
    batched = library(
        inputs_embeds=torch.cat([padded, queries], dim=1), attention_mask=whole,
        position_ids=(whole.cumsum(1) - 1).clamp_min(0), output_hidden_states=True, use_cache=False,
    ).hidden_states  # fmt: skip
    for place, index in enumerate((2, LAYERS)):
        full = batched[index]
        torch.testing.assert_close(of_prompts[:, place], full[:, :PREFIX][mask.bool()], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(of_queries[:, place], full[:, PREFIX:], atol=1e-5, rtol=1e-5)


def test_a_sample_is_the_same_alone_and_between_others(model):
    prefix, queries = embeddings()
    of_prompts, of_queries = states_of(model, prefix, queries, (LAYERS,))
    order = [2, 0, 1]
    parts = prefix.split(LENGTHS)
    slots = {"prefix_state_0": torch.cat([parts[row] for row in order]), "queries": queries[order]}
    slots |= {"tokens": torch.zeros(len(prefix), dtype=torch.int64), "lengths": torch.tensor(LENGTHS)[order]}
    names = [f"{kind}_state_{LAYERS}" for kind in ("prefix", "query")]
    found = Subprogram(layers_of(model, (LAYERS,)), names)(slots)
    torch.testing.assert_close(found[names[1]], of_queries[order, 0], atol=1e-6, rtol=1e-6)
    moved = torch.cat([of_prompts[:, 0].split(LENGTHS)[row] for row in order])
    torch.testing.assert_close(found[names[0]], moved, atol=1e-6, rtol=1e-6)


def test_the_prefix_comes_out_without_gradient_and_the_queries_with(model):
    prefix, queries = embeddings()
    prefix.requires_grad_()  # as it arrives from a pipeline stage that trained the embeddings
    of_prefix, of_queries = states_of(model, prefix, queries, (1, LAYERS))
    assert not of_prefix.requires_grad
    assert torch.autograd.grad(of_queries.sum(), prefix, allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.grad(of_queries.square().sum(), queries)[0].abs().max() > 0


def test_queries_on_stored_states_are_bit_equal_to_those_behind_the_prompt(model):
    """What `data.encoded` stores are the prompt's states; the rest of the list reads them instead of computing them."""
    sampled = (1, LAYERS)
    prefix, queries = embeddings()
    given = prompts_of(prefix)
    wanted = [f"prefix_state_{index}" for index in range(1, LAYERS + 1)]
    stored = {"prefix_state_0": prefix, **Subprogram(layers_of(model, sampled), wanted)(given)}
    rest = Subprogram(layers_of(model, sampled), [f"query_state_{k}" for k in sampled], given=stored)
    assert not any("prefix_state" in name for layer in rest.layers for name in layer.writes)
    twin = queries.detach().clone().requires_grad_()
    slots = rest({**given, **stored, "queries": twin})
    whole = states_of(model, prefix, queries, sampled)[1]
    halves = torch.stack([slots[f"query_state_{k}"] for k in sampled], dim=1)
    assert torch.equal(halves, whole)
    (gradient,) = torch.autograd.grad(halves.square().sum(), twin)
    assert torch.equal(gradient, torch.autograd.grad(whole.square().sum(), queries)[0])


def test_a_recomputed_list_has_the_same_gradients_and_runs_the_prompt_once(model, monkeypatch):
    gradients, runs = [], []
    calls = [0]
    forward = type(model.layers[0].mlp).forward

    def counted(module, hidden):
        calls[0] += len(hidden) == sum(LENGTHS)
        return forward(module, hidden)

    monkeypatch.setattr(type(model.layers[0].mlp), "forward", counted)
    for recompute in (False, True):
        prefix, queries = embeddings()
        layers, calls[0] = layers_of(model, (LAYERS,)), 0
        live = {**prompts_of(prefix), "queries": queries}
        for layer in layers:
            live |= run_layer(layer, live, [*live, *layer.writes], recompute)
        gradients += torch.autograd.grad(live[f"query_state_{LAYERS}"].square().sum(), queries)
        runs.append(calls[0])
    assert torch.equal(gradients[0], gradients[1])
    assert runs == [LAYERS, LAYERS] and sum(LENGTHS) != len(LENGTHS) * QUERIES


def test_decoding_with_kept_keys_and_values_equals_the_library(model, library):
    """Each further token alone, past the keys and values of those before it."""
    head = torch.nn.Linear(WIDTH, 50, bias=False).requires_grad_(False)
    tokens = torch.tensor([3, 7, 11, 2, 30, 4, 9])
    start = 3
    kept = [f"prefix_{kind}_{index}" for index in range(1, LAYERS + 1) for kind in ("keys", "values")]
    prompt = [PromptPositions(Rotary(model.config)), *prompt_layers(model, -1, None, PREFIX, frozen=True)]
    slots = Subprogram(prompt, kept)({"tokens": tokens[:start], "lengths": torch.tensor([start])})
    step = Subprogram(decoding_layers(model, head, Rotary(model.config)), ("logits", *kept))
    whole = head(library(input_ids=tokens[None], use_cache=False).last_hidden_state)[0]
    for place in range(start, len(tokens)):
        slots = step({**slots, "token": tokens[place : place + 1], "position": torch.tensor([place])})
        torch.testing.assert_close(slots["logits"][0], whole[place], atol=1e-5, rtol=1e-5)


def test_rotary_angles_are_fp32_and_have_values_also_for_a_model_without_them(model):
    places = torch.tensor([0, 1000])
    cos, _ = Rotary(model.config)(places)
    head_width = WIDTH // 4
    frequency = model.config.rope_parameters["rope_theta"] ** -(torch.arange(0, head_width, 2) / head_width)
    assert cos.dtype == torch.float32
    torch.testing.assert_close(cos[1, : head_width // 2], (1000 * frequency).cos(), atol=1e-4, rtol=0)
    with torch.device("meta"):
        assert Rotary(model.config)(places)[0].device.type == "cpu"


def test_a_layer_of_another_model_is_refused(model):
    other = copy.deepcopy(model)
    other.layers[1] = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="Linear is not a Qwen2DecoderLayer"):
        query_layers(other, (), PREFIX)


def test_a_model_with_sliding_window_attention_is_refused():
    config = Qwen2Config(
        vocab_size=8, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=8, use_sliding_window=True, sliding_window=4, max_window_layers=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="sliding-window attention"):
        prompt_layers(Qwen2Model(config), -1, None, PREFIX, frozen=True)


def test_queries_start_standard_normal_and_are_shared_by_the_batch():
    queries = QueryEmbeddings(64, 64)
    initialise(queries, seed=0)
    out = queries(3)
    assert out.shape == (3, 64, 64) and torch.equal(out[0], out[2])
    assert out[0].std().item() == pytest.approx(1, rel=0.03) and abs(out[0].mean().item()) < 0.05
