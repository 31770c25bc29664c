"""Counted costs of layers: right numbers of operations, the bytes that autograd keeps, cuts that are best."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from nano import NANO
from tiny_parts import TINY, make_parts
from tiny_runs import phase_values
from torch import Tensor, nn
from toy_program import INPUTS, TERMS, Toy

from parallel.costs import activation_bytes, balanced_cut, layer_costs
from parallel.errors import UserError
from parallel.pipeline import describe, stage_bounds
from parallel.program import Layer, Program
from spar_scale.config.recipe import Recipe
from spar_scale.models.blocks import TransformerLayer
from spar_scale.models.presets import Preset
from spar_scale.ops import attention
from spar_scale.stages import Stage, build
from spar_scale.stages.costs import micro_batch, pipeline_costs

BATCH = 3


class Mixed(Layer):
    """Attention and a depthwise convolution, the ones whose count is ours."""

    reads, writes = ("h",), ("h",)

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.conv = TransformerLayer(16, 4), nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)

    def forward(self, h: Tensor) -> dict[str, Tensor]:
        h = self.attention(h.unflatten(1, (1, 16)).expand(-1, 9, -1))
        return {"h": self.conv(h.transpose(1, 2).unflatten(2, (3, 3))).mean((2, 3))}


class Square(Layer):
    reads, writes = ("h",), ("size",)

    def forward(self, h: Tensor) -> dict[str, Tensor]:
        return {"size": h.square().mean(1)}


def joint(folder: Path, preset: Preset, **changes: Any) -> tuple[Recipe, Stage]:
    values = phase_values(folder, "align/joint", folder, make_parts(folder, preset), preset.name, **changes)
    recipe = Recipe.model_validate_json(json.dumps(values))
    return recipe, build(recipe)


def toy_costs(layers: list[Layer], **options: Any) -> list[Any]:
    return layer_costs(layers, {name: torch.zeros(BATCH, 8) for name in INPUTS}, list(TERMS), **options)


def test_a_frozen_layer_costs_its_forward_and_a_trained_one_three_times_that():
    model = Toy()
    teacher, first, second, _, _, _ = toy_costs(list(model.layers))  # type: ignore[arg-type]
    assert (teacher.forward_flops, teacher.backward_flops, teacher.saved) == (2 * BATCH * 8 * 16, 0, {})
    assert first.backward_flops == first.forward_flops, "no gradient of the batch is needed"
    assert second.backward_flops == 2 * second.forward_flops == 4 * BATCH * 16 * 16


def test_a_gradient_through_a_frozen_layer_costs_the_forward_again():
    model = Toy()
    model.layers[2].requires_grad_(False)
    cost = toy_costs(list(model.layers))[2]  # type: ignore[arg-type]
    assert cost.backward_flops == cost.forward_flops


def test_recomputation_adds_the_forward_and_keeps_inputs_alone():
    layers: list[Any] = list(Toy().layers)
    kept, again = toy_costs(layers), toy_costs(layers, recompute=True)
    assert [cost.flops + cost.forward_flops for cost in kept][2] == again[2].flops
    assert sum(again[2].saved.values()) == 4 * BATCH * 16 < sum(kept[2].saved.values())


def test_attention_and_depthwise_convolutions_are_counted_by_their_products():
    layer, tokens = Mixed(), BATCH * 9
    cost = layer_costs([layer, Square()], {"h": torch.zeros(BATCH, 16)}, ["size"])[0]
    linears = 2 * tokens * sum(m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear))
    attention, convolution = 4 * tokens * 9 * 16, 2 * tokens * 9 * 16
    assert cost.forward_flops == linears + attention + convolution
    assert cost.backward_flops == 2 * (linears + convolution) + attention * 5 // 2


def test_the_layers_are_left_as_they_are():
    model = Toy()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    toy_costs(list(model.layers))  # type: ignore[arg-type]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.device.type == "cpu" for parameter in model.parameters())


@pytest.mark.parametrize("preset", [NANO, TINY], ids=lambda preset: preset.name)
def test_activations_are_the_bytes_that_autograd_keeps(tmp_path: Path, preset: Preset, monkeypatch):
    def as_a_packed_kernel(backend, q, k, v, causal, scale, packing):
        """What it keeps: samples of equal length are one dense batch."""
        return attention._dense_samples(backend, q, k, v, causal, scale, len(packing.cu_seqlens_q) - 1)

    monkeypatch.setattr(attention, "_takes_packed", lambda backend, device: True)
    monkeypatch.setattr(attention, "_varlen", as_a_packed_kernel)
    recipe, stage = joint(tmp_path, preset)
    shapes = micro_batch(recipe, stage)
    counted = activation_bytes(layer_costs(stage.layers, shapes, list(stage.terms)))
    weights = {parameter.untyped_storage()._cdata for parameter in stage.model.parameters()}
    kept: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    slots = {name: torch.ones(shape.shape, dtype=shape.dtype) for name, shape in shapes.items()}
    slots["lengths"] *= len(slots["tokens"]) // len(slots["lengths"])
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        Program(stage.layers, stage.inputs, list(stage.terms))(slots)
    measured = sum(storage.nbytes() for storage in kept.values())
    print(f"{preset.name}: counted {counted}, kept {measured}")
    assert counted == pytest.approx(measured, rel=0.01)


def test_a_cut_is_as_good_as_the_best_of_all_cuts():
    draws = random.Random(3)
    for length, runs in itertools.product(range(1, 8), range(1, 5)):
        weights = [draws.choice([0, 1, 2, 5, 9]) for _ in range(length)]
        if runs > length:
            with pytest.raises(ValueError, match=f"{length} entries cannot be cut into {runs} non-empty runs"):
                balanced_cut(weights, runs)
            continue
        heaviest = [
            largest(weights, [0, *inner, length]) for inner in itertools.combinations(range(1, length), runs - 1)
        ]
        bounds = balanced_cut(weights, runs)
        assert len(bounds) == runs + 1 and bounds == sorted(set(bounds))
        assert largest(weights, bounds) == min(heaviest)


def largest(weights: Sequence[float], bounds: Sequence[int]) -> float:
    return max(sum(weights[a:b]) for a, b in itertools.pairwise(bounds))


def test_the_joint_phase_is_cut_more_evenly_than_by_the_number_of_layers(tmp_path: Path):
    recipe, stage = joint(tmp_path, NANO, parallel={"pipeline": 2, "micro_batch": 2})
    costs = pipeline_costs(recipe, stage)
    assert costs == pipeline_costs(recipe, stage), "every start must cut alike"
    bounds, middle = stage_bounds(costs, 2), len(costs) // 2
    ours, uniform = (largest(costs, cut) / sum(costs) for cut in (bounds, [0, middle, len(costs)]))
    print(f"largest of two stages: {ours:.1%} balanced, {uniform:.1%} uniform; {describe(bounds, costs)}")
    assert ours < uniform - 0.02
    assert describe(bounds, costs).startswith(f"layers 0-{bounds[1] - 1} (")


def test_stored_slots_have_the_shapes_that_the_encoding_gives(tmp_path: Path):
    recipe, stage = joint(tmp_path, NANO, parallel={"pipeline": 2, "micro_batch": 2})
    shapes = micro_batch(recipe, stage.encoded())
    tokens, width = NANO.conditioning.max_words + NANO.vision.tokens + 2, NANO.language.width
    assert shapes["latent"].shape == (2, *NANO.latent_shape) and "images" not in shapes
    assert shapes["prefix_state_0"].shape == (2 * tokens, width)
    assert len(pipeline_costs(recipe, stage.encoded())) == len(stage.encoded().layers)


def test_more_stages_than_layers_are_refused():
    with pytest.raises(
        UserError, match=r"parallel\.pipeline: found 3, but this phase has 2 layers.*maximum is parallel\.pipeline=2"
    ):
        stage_bounds([1.0, 1.0], 3)
    assert stage_bounds([1.0, 1.0], 2) == [0, 1, 2]
