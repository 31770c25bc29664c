"""The engine's own state through a checkpoint: what a rank writes, and what moves between layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import run_world
from tiny_runs import make_autoencoder, make_data, recipe_values
from torch.utils._python_dispatch import TorchDispatchMode


class LargestAllocation(TorchDispatchMode):
    """The largest new floating-point storage, in elements, that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        known = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in known:
                    self.largest = max(self.largest, storage.nbytes() // tensor.element_size())
        return result


def save_real(rank: int, world: int, recipes: list[dict[str, Any]], saves: list[str]) -> list[dict[str, Any]]:
    """Build the engine of each recipe as the trainer does, save it, and say what this rank wrote."""
    from parallel import checkpoint
    from parallel.launch.heartbeat import Heartbeat
    from parallel.launch.world import start
    from parallel.topology import Layout, Topology
    from spar_scale.config.recipe import Recipe
    from spar_scale.training.run_directory import RunDirectory
    from spar_scale.training.trainer import Trainer

    found = []
    for values, save in zip(recipes, saves, strict=True):
        recipe = Recipe.model_validate_json(json.dumps(values))
        launch, topology = start(), Topology(Layout(zero=recipe.parallel.zero))
        with RunDirectory(recipe, topology) as directory:
            trainer = Trainer(recipe, launch, topology, directory, Heartbeat(topology, recipe.guards.timeout_s))
            fragments = trainer.engine.state.fragments()
            with LargestAllocation() as allocation:
                path = checkpoint.save(Path(save), 1, fragments, {}, {}, topology.files_group, keep=1)
            sizes = [tensor.numel() for fragment in fragments for tensor in fragment.tensors.values()]
            whole = max(parameter.numel() for parameter in whole_parameters(recipe))
            found.append(
                {
                    "share_bytes": 4 * sum(sizes),
                    "written_bytes": (path / f"__{rank}_0.distcp").stat().st_size,
                    "largest_allocation": allocation.largest,
                    "largest_piece": max(sizes),
                    "largest_parameter": whole,
                }
            )
            trainer.close()
    return found


def whole_parameters(recipe: Any) -> list[torch.nn.Parameter]:
    from spar_scale import stages

    return [parameter for parameter in stages.build(recipe).model.parameters() if parameter.requires_grad]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("saved")
    shards, autoencoder = make_data(folder / "data"), make_autoencoder(folder / "autoencoder")
    stages = (1, 2, 3)
    recipes = [recipe_values(folder / f"z{zero}", shards, autoencoder, parallel__zero=zero) for zero in stages]
    saves = [str(folder / f"save{zero}") for zero in stages]
    by_rank = run_world(4, save_real, recipes, saves, initialise=False)
    return {zero: [rank[index] for rank in by_rank] for index, zero in enumerate(stages)}


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_rank_writes_its_share_and_no_more(saved: dict, zero: int) -> None:
    total = sum(rank["share_bytes"] for rank in saved[zero])
    for rank, found in enumerate(saved[zero]):
        over = found["written_bytes"] / found["share_bytes"] - 1
        print(f"ZeRO {zero}, rank {rank}: share {found['share_bytes']} bytes, written {over:+.2%}")
        assert 0 < over < 0.05
        assert found["share_bytes"] == pytest.approx(total / 4, rel=0.05)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_no_tensor_is_made_whole_while_saving(saved: dict, zero: int) -> None:
    for found in saved[zero]:
        assert found["largest_allocation"] <= found["largest_piece"]
        if zero == 3:  # every parameter is shared out, so no piece is a whole large one
            assert found["largest_piece"] <= -(-found["largest_parameter"] // 4)


BOUNDS = {"adamw": 1e-5, "nadam": 1e-5, "radam": 1e-5, "muon": 1e-2}
SAVED, RESUMED = ((2, 1), (2, 3)), ((1, 2), (2, 3), (3, 2))
"""(processes, ZeRO stage) of the worlds that save and of those that go on."""


def move(rank: int, world: int, optimizer: str, zero: int, root: str, loads: bool) -> list[float]:
    """Four steps of a toy program, saved after two; or the last two from what another layout saved."""
    from toy_program import LR, Toy, engine_for, muon_groups, train

    from parallel import checkpoint

    model = Toy()
    if loads:
        for parameter in model.parameters():
            parameter.data.add_(1.0)  # what is loaded, not what was built, must count
        model.layers[0].load_state_dict(Toy().layers[0].state_dict())  # the frozen part comes by reference
    groups = muon_groups(model) if optimizer == "muon" else None
    engine = engine_for(model, zero, 1, 0.0, optimizer, groups)
    group = engine.topology.files_group
    if not loads:
        curve = train(engine, 0, 2, lr=LR)
        state = {"scalars": engine.state.scalars()}
        checkpoint.save(Path(root), 2, engine.state.fragments(), state, {}, group, keep=1)
    else:
        path = Path(root) / "step-00000002"
        state = checkpoint.load(path, engine.state.fragments(loading=True), {}, group)
        engine.state.restore(state["scalars"])
        curve = []
    curve += train(engine, 2, 2, lr=LR)
    engine.close()
    return [loss for loss, _, _ in curve]


def move_all(rank: int, world: int, zero: int, roots: list[Path], loads: bool) -> dict[tuple[str, str], list[float]]:
    """Under each root, every optimizer one after another: (root, optimizer) -> losses."""
    return {
        (root.name, optimizer): move(rank, world, optimizer, zero, str(root / optimizer), loads)
        for root in roots
        for optimizer in BOUNDS
    }


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    folder = tmp_path_factory.mktemp("moved")
    roots = {layout: folder / "-".join(map(str, layout)) for layout in SAVED}
    whole: dict[tuple[str, str], list[float]] = {}
    for (world, zero), root in roots.items():
        whole |= run_world(world, move_all, zero, [root], False, initialise=False)[0]
    resumed = {
        (world, zero): run_world(world, move_all, zero, list(roots.values()), True, initialise=False)[0]
        for world, zero in RESUMED
    }
    return whole, resumed


@pytest.mark.parametrize("optimizer", BOUNDS)
@pytest.mark.parametrize("layout", RESUMED, ids=str)
def test_state_moves_between_layouts(moved: tuple[dict, dict], layout: tuple[int, int], optimizer: str) -> None:
    whole, resumed = moved
    for key in [key for key in whole if key[1] == optimizer]:
        assert resumed[layout][key] == pytest.approx(whole[key][2:], rel=BOUNDS[optimizer]), key
