"""The arithmetic of what an engine keeps, against engines: the same bytes, of each kind, on each rank."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from launching import run_world
from nano import NANO
from tiny_parts import make_parts
from tiny_runs import make_data, phase_values

from parallel.pipeline import stage_bounds
from parallel.topology import Layout
from parallel.zero.state_bytes import state_bytes
from spar_scale.config.recipe import Recipe
from spar_scale.planning.plan import count

MUON = {"optimizer__name": "muon", "optimizer__clip": 0}
CASES: dict[str, tuple[int, int, int, int, dict[str, Any]]] = {
    "dp4-z2": (4, 1, 1, 2, {}),
    "tp2-pp2-z1": (4, 2, 2, 1, {}),
    "tp2-dp2-z3": (4, 2, 1, 3, {}),
    "pp2-dp2-z1": (4, 1, 2, 1, {}),
    "dp1-z1": (1, 1, 1, 1, {}),
    "dp4-z2-bf16": (4, 1, 1, 2, {"precision": "bf16"}),
    "dp4-z3-bf16": (4, 1, 1, 3, {"precision": "bf16"}),
    "dp1-z1-bf16": (1, 1, 1, 1, {"precision": "bf16"}),
    "dp4-z1-muon": (4, 1, 1, 1, MUON),
    "dp1-z1-nadam": (1, 1, 1, 1, {"optimizer__name": "nadam"}),
}
"""Name -> processes, tensor, pipeline, ZeRO stage, and what else the recipe says."""


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("bytes")
    make_data(folder / "data", edits=64)
    parts = make_parts(folder / "parts", NANO)
    return {
        name: phase_values(
            folder / name, "align/joint", folder / "data", parts, "nano", global_batch=16, data__task_block=16,
            parallel={"tensor": tensor, "pipeline": pipeline, "zero": zero, "micro_batch": 2}, **more,
        )
        for name, (_, tensor, pipeline, zero, more) in CASES.items()
    }  # fmt: skip


@pytest.fixture(scope="module")
def measured(recipes: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found = {}
    for world in (1, 4):
        names = [name for name, (processes, *_) in CASES.items() if processes == world]
        ranks = run_world(world, measure_all, [recipes[name] for name in names], initialise=False, timeout_s=800)
        found |= {name: [rank[number] for rank in ranks] for number, name in enumerate(names)}
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_kind_is_exact_on_every_rank(name: str, recipes: dict[str, Any], measured: dict[str, Any]) -> None:
    world, tensor, pipeline, zero, _ = CASES[name]
    recipe = Recipe.model_validate_json(json.dumps(recipes[name]))
    counted = count(recipe, tensor)
    bounds = stage_bounds([cost.flops for cost in counted.costs], pipeline)
    shape = counted.zero_shape(Layout(tensor, pipeline, zero), world // (tensor * pipeline), recipe.precision == "bf16")
    for rank in measured[name]:
        first, end = list(itertools.pairwise(bounds))[rank["stage"]]
        expected = state_bytes(counted.stage_weights(first, end), counted.num_groups, shape, rank["data_rank"])
        print(name, expected)
        assert rank["bytes"] == expected
        assert rank["left"] == []
        assert min(expected["weights"], expected["frozen"], expected["gradients"]) > 0


def measure_all(rank: int, world: int, recipes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from parallel.launch.world import stop

    found = [measure(Recipe.model_validate_json(json.dumps(values))) for values in recipes]
    stop()
    return found


def measure(recipe: Recipe) -> dict[str, Any]:
    """One step of a trainer of the recipe; bytes by kind after it, gradients as they were before their reduction."""
    from parallel.launch.heartbeat import Heartbeat
    from parallel.launch.world import start
    from parallel.topology import Layout, Topology
    from parallel.zero.kept_bytes import kept_bytes
    from spar_scale.training.run_directory import RunDirectory
    from spar_scale.training.trainer import Trainer

    launch = start()
    topology = Topology(Layout(recipe.parallel.tensor, recipe.parallel.pipeline, recipe.parallel.zero))
    with RunDirectory(recipe, topology) as directory:
        trainer = Trainer(recipe, launch, topology, directory, Heartbeat(topology, recipe.guards.timeout_s))
        gradients = watch_gradients(trainer.engine)
        trainer._train_step(iter(trainer.loader))
        found = kept_bytes(trainer.engine) | {"gradients": gradients[0]}
        left = beside_engine(trainer.stage.model, trainer.engine.deepspeed.module)
        trainer.close()
    return {"stage": topology.pipeline_stage, "data_rank": topology.data_rank, "bytes": found, "left": left}


def beside_engine(model: torch.nn.Module, held: torch.nn.Module) -> list[str]:
    """The parameters of a model that take memory though the engine does not hold them."""
    own = {id(parameter) for parameter in held.parameters()}
    return [name for name, value in model.named_parameters() if id(value) not in own and not value.is_meta]


def watch_gradients(engine: Any) -> list[int]:
    """The list that will hold the bytes of gradients at the end of each micro-batch's backward pass."""
    seen: list[int] = []
    wrapped = engine.deepspeed.optimizer

    def look() -> None:
        if engine.zero == 3:
            held = [wrapped.grad_partitions_flat_buffer]
        elif engine.zero == 2:
            groups = [*wrapped.all_grad_tensors.values(), *wrapped.averaged_gradients.values()]
            held = [tensor for tensors in groups if tensors for tensor in tensors]
        else:
            held = [*getattr(wrapped, "fp32_groups_gradients_flat", [])]  # of bf16
            held += [parameter.grad for parameter in engine.deepspeed.module.parameters() if parameter.grad is not None]
        seen.append(size(held))

    if engine.pipelined:
        before(wrapped, "reduce_gradients", look)
    elif hasattr(wrapped, "update_hp_grads"):  # bf16 under ZeRO-1 adds its gradients up here
        before(wrapped, "update_hp_grads", look)
    else:
        before(engine.deepspeed, "step", look)
    return seen


def before(holder: Any, name: str, look: Any) -> None:
    call = getattr(holder, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        look()
        return call(*args, **kwargs)

    setattr(holder, name, watched)


def size(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
