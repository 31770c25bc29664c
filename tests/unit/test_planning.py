"""Plans of layouts: all are looked at, what cannot be says why, and a checked rank is what was planned."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from nano import NANO
from tiny_runs import phase_values

from parallel.errors import UserError
from parallel.fake_world import fake_world
from parallel.planner import FREE_SHARE, CountedProgram, Work, estimate_layout
from parallel.topology import Layout
from spar_scale.config.recipe import Recipe
from spar_scale.planning import plan as planning
from spar_scale.planning import rank_check
from spar_scale.planning.gpus import GPUS
from spar_scale.planning.model_parts import part_of
from spar_scale.planning.plan import Plan, count, plan
from spar_scale.planning.rank_check import check_rank

NOWHERE = {part: f"nowhere/{part}" for part in ("mllm", "tokenizer", "diffusion")}


def recipe(**changes: Any) -> Recipe:
    """The joint phase of the nano preset; neither its parts nor its data exist."""
    general = {"global_batch": 24, "data__task_block": 4, "parallel": {"micro_batch": 2}}
    values = phase_values(Path("nowhere"), "align/joint", Path("nowhere"), NOWHERE, NANO.name, **(general | changes))
    return Recipe.model_validate_json(json.dumps(values))


@pytest.fixture(scope="module")
def eight() -> Plan:
    return plan(recipe(), 8, "h200")


@pytest.fixture(scope="module")
def counted() -> CountedProgram:
    return count(recipe(), 1)


def test_every_layout_of_the_gpus_is_there_once_the_best_first(eight: Plan):
    sizes = [
        (found.layout.tensor, found.layout.pipeline, found.data_size, found.layout.zero) for found in eight.estimates
    ]
    assert len(sizes) == len(set(sizes)) == 30
    assert all(tensor * pipeline * data == 8 for tensor, pipeline, data, _ in sizes)
    good = [found for found in eight.estimates if found.refused is None]
    assert [found.step_s for found in good] == sorted(found.step_s for found in good)
    assert all(found.refused for found in eight.estimates[len(good) :])


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (Layout(1, 2, 2), r"parallel\.zero: found 2 with parallel\.pipeline 2"),
        (Layout(4, 1, 1), r"parallel\.tensor: found 4; preset 'nano' has language\.key_value_heads 2"),
        (Layout(1, 1, 1), r"8 data ranks share each task block of 4 samples.*data\.task_block=8"),
    ],
)
def test_what_cannot_be_says_why(eight: Plan, layout: Layout, reason: str):
    (found,) = [found for found in eight.estimates if found.layout == layout]
    assert found.refused is not None and re.search(reason, found.refused)
    assert re.search(reason, eight.text())


def test_the_table_marks_the_recipes_own_layout_and_json_holds_everything(eight: Plan):
    assert "the recipe's own layout, tp1-pp1-dp8-z1: 8 data ranks" in eight.text()
    told = json.loads(eight.json())
    assert len(told["layouts"]) == 30 and told["assumptions"] and told["flops"].keys() >= {"diffusion", "language"}
    own = Plan(recipe(parallel={"micro_batch": 2, "pipeline": 4}), eight.machine, 8, eight.estimates, eight.flops)
    assert re.search(r"^\*      1        4    2    1 ", own.text(), re.MULTILINE)
    odd = Plan(recipe(parallel={"micro_batch": 2, "pipeline": 3}), eight.machine, 8, eight.estimates, eight.flops)
    assert "the recipe's own layout does not divide 8 GPUs" in odd.text()


def test_prompts_are_counted_as_long_as_the_recipe_says(counted: CountedProgram, eight: Plan):
    flops = {
        tokens: sum(cost.flops for cost in count(recipe(data__plan_tokens=tokens), 1).costs) for tokens in (4, 9, 14)
    }
    assert flops[4] < flops[9] < flops[14] == sum(cost.flops for cost in counted.costs)
    assert "prompts of 14 tokens, the longest that are read: set data.plan_tokens" in eight.text()


def test_muon_is_refused_with_tensor_or_pipeline():
    with pytest.raises(UserError, match=r"parallel\.pipeline: found 2 with optimizer\.name muon"):
        planning.refuse(recipe(optimizer__name="muon", optimizer__clip=0), Layout(1, 2, 1), 2)


def test_a_gpu_that_is_too_small_is_told_with_what_takes_most(counted: CountedProgram):
    work, small = Work(24, 2, half=False), replace(GPUS["h200"], memory_bytes=2**27)
    found = estimate_layout(counted, Layout(), 4, 6, work, small)
    room = 2**27 * (1 - FREE_SHARE) / 2**30
    assert found.refused is not None
    assert re.fullmatch(rf"does not fit: 0\.2 of {room:.1f} GiB, most of it buckets", found.refused)
    assert estimate_layout(counted, Layout(), 4, 6, work, GPUS["h200"]).refused is None


def test_a_pipeline_waits_and_a_data_group_pays_for_the_network(counted: CountedProgram):
    work, machine = Work(24, 2, half=False), GPUS["h200"]
    one, four = (estimate_layout(counted, Layout(pipeline=p), 4, 6, work, machine) for p in (1, 4))
    assert (one.bubble, four.bubble) == (0, 3 / 9)
    assert one.seconds["bubble"] == 0 < four.seconds["bubble"]
    assert one.traffic["pipeline"] == 0 < four.traffic["pipeline"]
    within, across = (estimate_layout(counted, Layout(), size, 6, work, machine) for size in (8, 16))
    trained = sum(w.numel for w in counted.stage_weights(0, len(counted.costs)) if w.group is not None)
    assert within.traffic["data"] == int(8 * trained * 7 / 8)
    assert across.seconds["data"] > 8 * within.seconds["data"]


def test_tensor_ranks_share_operations_and_weights_and_pay_with_traffic(counted: CountedProgram):
    halves = count(recipe(), 2)
    whole, half = (sum(cost.flops for cost in program.costs) for program in (counted, halves))
    assert 0.45 * whole < half < 0.65 * whole
    assert sum(cost.reduced_bytes for cost in counted.costs) == 0 < sum(cost.reduced_bytes for cost in halves.costs)
    assert halves.weights.keys() == counted.weights.keys()
    assert sum(w.numel for w in halves.weights.values()) < sum(w.numel for w in counted.weights.values())


@pytest.mark.parametrize("layout", [{"zero": 2}, {"zero": 3, "tensor": 2}, {"tensor": 2, "pipeline": 2}])
def test_the_engine_of_a_checked_rank_keeps_what_was_planned(layout: dict[str, int]):
    told = check_rank(recipe(global_batch=64, data__task_block=64, parallel={"micro_batch": 1, **layout}), 64, 37)
    assert f"engine: ZeRO {layout.get('zero', 1)}, built on CPU tensors, has the planned" in told


@pytest.mark.parametrize(("rank", "place"), [(0, (0, 0, 0)), (37, (1, 2, 1)), (511, (1, 15, 15))])
def test_a_checked_rank_of_a_large_world_is_where_and_what_was_planned(rank: int, place: tuple[int, int, int]):
    large = recipe(data__task_block=24, parallel={"micro_batch": 2, "tensor": 2, "pipeline": 16})
    told = check_rank(large, 512, rank)
    assert "(tensor rank {}, data rank {}, pipeline stage {})".format(*place) in told and "as planned" in told


def test_a_rank_that_differs_from_the_plan_is_an_error(monkeypatch: pytest.MonkeyPatch, counted: CountedProgram):
    monkeypatch.setattr(rank_check, "count", lambda *_: counted)  # planned whole, built in halves
    with pytest.raises(RuntimeError, match=r"rank 1 has \d+ weights, the plan has \d+"):
        check_rank(recipe(parallel={"micro_batch": 2, "tensor": 2}), 4, 1)


def test_ranks_and_gpus_that_are_not_there_are_refused():
    with pytest.raises(UserError, match=r"--check-rank: found 8, must be from 0 to 7, the ranks of 8 GPUs"):
        check_rank(recipe(), 8, 8)
    with pytest.raises(UserError, match=r"--gpu: found 'h20', must be one of h200, h100-80, .*did you mean 'h200'\?"):
        plan(recipe(), 8, "h20")


def test_a_fake_world_is_not_made_within_another():
    with fake_world(4, 3) as group:
        assert (group.size(), group.rank()) == (4, 3)
        with pytest.raises(RuntimeError, match="cannot simulate another"), fake_world(2, 0):
            pass


def test_a_layer_belongs_to_the_part_that_its_longest_name_says():
    assert part_of(["tokenizer.vision_tower.encoder.layer.0.weight"]) == "vision"
    assert part_of(["tokenizer.fusion.linear_1.weight"]) == "tokenizer"
    assert part_of(["diffusion.transformer.proj_out.weight"]) == "diffusion"
    assert part_of([]) == "losses"
