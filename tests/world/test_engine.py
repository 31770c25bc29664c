"""The engine against plain torch: curve, weights, EMA, frozen parts, padding, clipping, what is skipped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from launching import run_world
from toy_program import EMA_DECAY, Toy, engine_for, muon_groups, plain_torch, train

from parallel.optimizers import OPTIMIZERS

STEPS = 8
CASES = [
    (world, zero, pipeline, clip)
    for world, pipeline in ((1, 1), (2, 1), (2, 2), (4, 2))
    for zero in ((1, 2, 3) if pipeline == 1 else (1,))
    for clip in (0.0, 0.05)
]


def pieces(engine: Any) -> list[tuple[str, int, dict[str, torch.Tensor]]]:
    """(name, start, kind -> values) of this rank's share."""
    found = engine.state.fragments()
    return [(f.name, f.start, {kind: t.clone() for kind, t in f.tensors.items()}) for f in found]


def whole(shares: list[list[tuple]], kind: str) -> dict[str, torch.Tensor]:
    """Put all ranks' shares together; every element must be owned exactly once."""
    full = {name: torch.full((p.numel(),), torch.nan) for name, p in Toy().named_parameters() if p.requires_grad}
    for share in shares:
        for name, start, tensors in share:
            place = full[name][start : start + len(tensors[kind])]
            assert place.isnan().all(), f"{name} is owned twice"
            place.copy_(tensors[kind])
    assert not any(t.isnan().any() for t in full.values())
    return full


def run_cases(rank: int, world: int, cases: list[tuple]) -> list[tuple]:
    results = []
    for _, zero, pipeline, clip in cases:
        model = Toy()
        engine = engine_for(model, zero, pipeline, clip)
        results.append((train(engine, 0, STEPS), pieces(engine)))
        engine.close()
    return results


@pytest.fixture(scope="module")
def runs() -> dict[tuple, tuple]:
    """Case -> (curve, every rank's pieces)."""
    found = {}
    for world in (1, 2, 4):
        cases = [case for case in CASES if case[0] == world]
        by_rank = run_world(world, run_cases, cases, initialise=False)
        for index, case in enumerate(cases):
            found[case] = by_rank[0][index][0], [ranks[index][1] for ranks in by_rank]
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_engine_optimises_what_plain_torch_does(runs: dict, case: tuple) -> None:
    curve, shares = runs[case]
    reference, tensors = plain_torch(STEPS, case[3], EMA_DECAY)
    for (loss, norm, skipped), (wanted, wanted_norm) in zip(curve, reference, strict=True):
        assert loss == pytest.approx(wanted, rel=1e-5)
        assert norm == pytest.approx(wanted_norm, rel=2e-4)
        assert not skipped
    for kind in ("model", "ema"):
        for name, values in whole(shares, kind).items():
            torch.testing.assert_close(values, tensors[kind][name].flatten(), rtol=1e-3, atol=1e-4)


def test_clipping_was_active_and_changes_the_curve() -> None:
    clipped, free = plain_torch(STEPS, 0.05, EMA_DECAY)[0], plain_torch(STEPS, 0.0, EMA_DECAY)[0]
    assert min(norm for _, norm in clipped) > 0.05
    assert abs(clipped[-1][0] - free[-1][0]) > 1e-4 * free[-1][0]


def skip_and_close(rank: int, world: int, zero: int, pipeline: int) -> dict[str, Any]:
    model: Any = Toy()
    frozen = model.layers[0].linear.weight.detach().clone()
    linear = torch.nn.functional.linear
    engine = engine_for(model, zero, pipeline, clip=0.0)
    before = pieces(engine)
    poisoned = train(engine, 0, 1, poisoned=(0,))
    after = pieces(engine)
    healthy = train(engine, 1, 1)
    scalars = engine.state.scalars()
    weight = model.layers[0].linear.weight
    if zero == 3:  # what is held of it is this rank's share
        share = weight.ds_tensor.numel()
        held, wanted = weight.ds_tensor.flatten(), frozen.flatten()[rank * share :][:share]
    else:
        held, wanted = weight.flatten(), frozen.flatten()
    untouched = wanted.numel() > 0 and torch.equal(held[: wanted.numel()], wanted)
    engine.close()
    same = all(torch.equal(a[2][kind], b[2][kind]) for a, b in zip(before, after, strict=True) for kind in a[2])
    return {
        "poisoned": poisoned[0][2],
        "healthy": healthy[0][2],
        "unchanged": same,
        "steps": [values["step"] for values in scalars.values()],
        "linear": torch.nn.functional.linear is linear,
        "frozen": untouched,
    }


@pytest.mark.parametrize(("world", "zero", "pipeline"), [(1, 1, 1), (2, 2, 1), (2, 3, 1), (2, 1, 2)])
def test_a_non_finite_gradient_changes_nothing_and_training_goes_on(world: int, zero: int, pipeline: int) -> None:
    for found in run_world(world, skip_and_close, zero, pipeline, initialise=False):
        assert found["poisoned"]
        assert not found["healthy"]
        assert found["unchanged"]
        assert set(found["steps"]) == {1}
        assert found["frozen"]
        assert found["linear"], "torch's own linear was replaced for the whole process"


def muon_curves(rank: int, world: int, stages: list[int]) -> list[tuple[list[float], set[str]]]:
    found = []
    for zero in stages:
        model = Toy()
        engine = engine_for(model, zero, 1, 0.0, "muon", muon_groups(model))
        losses = [loss for loss, _, _ in train(engine, 0, STEPS)]
        found.append((losses, {kind for _, _, tensors in pieces(engine) for kind in tensors}))
        engine.close()
    return found


def test_muon_trains_alike_under_every_zero_stage() -> None:
    (one, kinds), *_ = run_world(1, muon_curves, [1], initialise=False)[0]
    assert kinds == {"model", "ema", "exp_avg", "exp_avg_sq", "momentum_buffer"}
    assert one[-1] < 0.9 * one[0]
    two = [losses for losses, _ in run_world(2, muon_curves, [1, 2, 3], initialise=False)[0]]
    for losses in two:
        # Newton-Schulz runs in bf16, so between world sizes the band is wider than AdamW's.
        assert losses == pytest.approx(one, rel=1e-2)
        assert losses == pytest.approx(two[0], rel=1e-4)


def declared_and_found(rank: int, world: int, name: str) -> dict[str, Any]:
    """Shapes and kinds of an optimizer's state before and after a first step, and the curve of the engine."""
    model = Toy()
    engine = engine_for(model, 2, 1, 0.0, name, muon_groups(model) if name == "muon" else None)

    def state() -> list[dict[str, Any]]:
        held = engine.deepspeed.optimizer.optimizer.state.values()
        return [{key: tuple(v.shape) if torch.is_tensor(v) else type(v) for key, v in one.items()} for one in held]

    before = state()
    curve = train(engine, 0, STEPS)
    after = state()
    engine.close()
    return {"before": before, "after": after, "losses": [loss for loss, _, _ in curve]}


HERE = [name for name in OPTIMIZERS if name not in ("apex_adam", "deepspeed_adam")]  # these need a GPU


@pytest.mark.parametrize("name", HERE)
def test_an_optimizer_keeps_the_state_that_the_table_declares(name: str) -> None:
    (found,) = run_world(1, declared_and_found, name, initialise=False)
    assert found["before"] == found["after"]
    assert found["losses"][-1] < found["losses"][0]


@pytest.mark.parametrize("name", [name for name in HERE if OPTIMIZERS[name].matrices is None])
def test_over_two_ranks_every_optimizer_gives_the_curve_of_plain_torch(name: str) -> None:
    plain = [loss for loss, _ in plain_torch(STEPS, 0.0, EMA_DECAY, name)[0]]
    for found in run_world(2, declared_and_found, name, initialise=False):
        assert found["losses"] == pytest.approx(plain, rel=1e-5)
