"""The order of samples: a function of (seed, step) that covers, mixes and shuffles as it says."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from parallel.errors import UserError
from spar_scale.data import order as order_module
from spar_scale.data.order import PADDING, BatchLayout, Blocks, Order, SourceShape, draw_generator, micro_steps

LAYOUTS = [(1, 64), (1, 5), (2, 8), (3, 4), (4, 3), (7, 2), (7, 16), (5, 1)]


def sources(*weights: float, samples: int = 97) -> list[SourceShape]:
    return [SourceShape(f"s{i}", w, (samples // 2, samples - samples // 2)) for i, w in enumerate(weights)]


def members(order: Order, numbers) -> list[tuple[int, int, int]]:
    places = [order.locate(int(n)) for n in numbers]
    return [(p.source, p.shard, p.member) for p in places]


@pytest.mark.parametrize(("global_batch", "task_block"), [(64, 16), (50, 16), (7, 7), (10, 64), (9, 1)])
@pytest.mark.parametrize(("dp", "micro_batch"), LAYOUTS)
def test_every_layout_takes_each_sample_of_a_step_once(global_batch, task_block, dp, micro_batch):
    layout = BatchLayout(Blocks(global_batch, task_block), micro_batch, dp)
    assert layout.per_step == micro_steps(global_batch, task_block, micro_batch, dp)
    for step in (0, 3):
        steps = range(step * layout.per_step, (step + 1) * layout.per_step)
        taken = [n for m in steps for rank in range(dp) for n in layout.samples(m, rank) if n != PADDING]
        assert sorted(taken) == list(range(step * global_batch, (step + 1) * global_batch))


@pytest.mark.parametrize(("dp", "micro_batch"), LAYOUTS)
def test_all_ranks_are_in_the_same_source_in_a_micro_step(dp, micro_batch):
    order = Order(0, sources(1, 1, 1), 50, 16)
    layout = BatchLayout(order.blocks, micro_batch, dp)
    for m in range(3 * layout.per_step):
        drawn = {order.locate(int(n)).source for rank in range(dp) for n in layout.samples(m, rank) if n >= 0}
        assert drawn == {order.source(layout.place(m)[0])}


def test_slots_of_a_block_go_to_ranks_in_turn():
    layout = BatchLayout(Blocks(12, 10), 3, 2)
    assert layout.samples(0, 0).tolist() == [0, 1, 2]
    assert layout.samples(0, 1).tolist() == [3, 4, 5]
    assert layout.samples(1, 1).tolist() == [9, -1, -1]
    assert layout.samples(2, 0).tolist() == [10, 11, -1]
    assert layout.samples(2, 1).tolist() == [-1, -1, -1]


@pytest.mark.parametrize(("global_batch", "task_block"), [(16, 4), (14, 4), (5, 8)])
def test_an_epoch_takes_every_sample_of_a_source_once(global_batch, task_block, monkeypatch):
    monkeypatch.setattr(order_module, "WINDOW", 16)  # several windows, the last shorter
    order = Order(1, sources(0.6, 0.4), global_batch, task_block)
    epochs: dict[tuple[int, int], Counter] = {}
    for n in range(1200):
        place = order.locate(n)
        epochs.setdefault((place.source, place.epoch), Counter())[place.shard, place.member] += 1
    everything = {(shard, m) for shard, size in enumerate((48, 49)) for m in range(size)}
    whole = [key for key in epochs if (key[0], key[1] + 1) in epochs]
    assert len(whole) >= 8
    for key in whole:
        assert set(epochs[key]) == everything
        assert set(epochs[key].values()) == {1}


def test_epochs_sources_and_seeds_have_orders_of_their_own():
    order = Order(0, sources(1, samples=200), 8, 8)
    first, second = (members(order, range(e * 200, (e + 1) * 200)) for e in (0, 1))
    assert first != second and sorted(first) == sorted(second)
    assert first != sorted(first)
    assert members(Order(1, sources(1, samples=200), 8, 8), range(200)) != first
    renamed = [SourceShape("other", 1, (100, 100))]
    assert members(Order(0, renamed, 8, 8), range(200)) != first


def test_the_shuffle_mixes_shards_within_a_window():
    order = Order(0, [SourceShape("s", 1, (10,) * 100)], 8, 8)
    assert len({order.locate(n).shard for n in range(100)}) > 40


@pytest.mark.parametrize("weights", [(0.6, 0.4), (3, 1, 1), (1 / 3, 1 / 3, 1 / 3), (0.7, 0.2999, 0.0011)])
def test_a_cycle_of_blocks_holds_every_source_in_its_share(weights):
    order = Order(5, sources(*weights), 30, 8)  # per step 3 full blocks and 1 short one, mixed apart
    kinds = {"full": [b for b in range(4000) if b % 4 != 3][:1000], "short": list(range(3, 4000, 4))[:1000]}
    for blocks in kinds.values():
        drawn = Counter(order.source(b) for b in blocks)
        for source, weight in enumerate(weights):
            assert abs(drawn[source] - 1000 * weight / sum(weights)) < 1
    assert {order.source(b) for b in range(12)} != {0}


def test_every_cycle_is_mixed_anew():
    order = Order(5, sources(1, 1), 8, 8)
    first, second = ([order.source(b) for b in range(c * 1000, (c + 1) * 1000)] for c in (0, 1))
    assert first != second and Counter(first) == Counter(second) == {0: 500, 1: 500}


def test_a_place_is_found_without_replaying_what_came_before():
    order = Order(2, sources(0.5, 0.3, 0.2), 30, 8)
    taken = [0, 0, 0]
    positions = {}
    for n in range(40 * 30):
        place = order.locate(n)
        positions[n] = (place.source, divmod(taken[place.source], 97)[0])
        assert place.epoch == positions[n][1]
        taken[place.source] += 1
    fresh = Order(2, sources(0.5, 0.3, 0.2), 30, 8)
    assert members(fresh, [1199, 17, 600]) == members(order, [1199, 17, 600])


def test_draws_of_different_keys_differ_and_the_same_repeat():
    keys = [(0, "crop", 5), (1, "crop", 5), (0, "flip", 5), (0, "crop", 6), (0, "crop", 2**40)]
    drawn = [draw_generator(*key).random(8) for key in keys]
    assert len({tuple(d) for d in drawn}) == len(keys)
    assert np.array_equal(draw_generator(0, "crop", 5).random(8), drawn[0])


def test_the_stream_is_the_one_that_checkpoints_were_made_with():
    """Recorded numbers: if they change, a run resumed from an old checkpoint would see other samples."""
    order = Order(7, sources(0.6, 0.4), 16, 4)
    assert members(order, range(0, 48, 6)) == GOLDEN_MEMBERS
    drawn = draw_generator(7, "crop", 11)
    assert [round(float(x), 6) for x in drawn.random(3)] == GOLDEN_UNIFORM
    assert [round(float(x), 5) for x in drawn.standard_normal(3, dtype=np.float32)] == GOLDEN_NORMAL


GOLDEN_MEMBERS = [(0, 1, 7), (1, 1, 25), (1, 1, 38), (1, 1, 26), (0, 1, 19), (0, 0, 33), (0, 1, 10), (1, 0, 21)]
GOLDEN_UNIFORM = [0.215488, 0.824906, 0.255722]
GOLDEN_NORMAL = [-0.59308, 0.02929, -0.51791]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "data.sources is empty"),
        (sources(1, 0), r"data.sources\[1\] \(s1\): weight is 0; it must be positive"),
        (sources(1, float("nan")), "weight is nan"),
        (sources(1, 1e-5), "weight 1e-05 gives less than one block in 1000"),
        ([*sources(1), *sources(1)], r"data.sources\[1\] \(s0\): another source has this name"),
        ([SourceShape("s", 1, (0,))], "its shards hold no samples"),
    ],
)
def test_a_mixture_that_cannot_be_honoured_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        Order(0, given, 8, 4)


@pytest.mark.parametrize(("numbers", "name"), [((0, 1, 1, 1), "global_batch"), ((1, 0, 1, 1), "task_block")])
def test_sizes_below_one_are_refused(numbers, name):
    with pytest.raises(UserError, match=f"{name} is 0; it must be at least 1"):
        micro_steps(*numbers)
