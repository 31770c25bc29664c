"""`spar-scale plan RECIPE --gpus N --check-rank R`: build one rank of a large world and compare it with the plan.

Groups, tensor cut, pipeline cut and shapes are those of the real run, on the meta device. If the rank's state is small
(as for the miniature), the engine is built too, on CPU tensors without values, and its bytes are counted; for larger
models they are only calculated. A difference between plan and rank is an error.
"""

from __future__ import annotations

import time
from itertools import pairwise

import torch

from parallel.errors import UserError
from parallel.fake_world import fake_world, materialize
from parallel.launch.world import start
from parallel.optimizers import OPTIMIZERS
from parallel.pipeline import stage_bounds
from parallel.planner import CountedProgram
from parallel.tensor import apply_tensor_parallel
from parallel.topology import Layout, Topology
from parallel.zero.engine import Engine, name_parameters
from parallel.zero.kept_bytes import kept_bytes
from parallel.zero.state_bytes import state_bytes
from spar_scale.config.recipe import Recipe
from spar_scale.models.sharding import tensor_plan
from spar_scale.planning.plan import count, refuse
from spar_scale.stages import Stage, meta_stage
from spar_scale.stages.parts import preset_of
from spar_scale.training.engine_settings import engine_settings
from spar_scale.training.optimizers import parameter_groups

ENGINE_BYTES = 2**30
"""An engine with more state is not built."""


def check_rank(recipe: Recipe, gpus: int, rank: int) -> str:
    """Build rank `rank` of the recipe's own layout on `gpus` GPUs and compare it with the plan; return a report.

    Raises UserError for an impossible rank or layout, RuntimeError if plan and rank differ.
    """
    parallel = recipe.parallel
    layout = Layout(parallel.tensor, parallel.pipeline, parallel.zero)
    if not 0 <= rank < gpus:
        raise UserError(f"--check-rank: found {rank}, must be from 0 to {gpus - 1}, the ranks of {gpus} GPUs")
    data_size = layout.data(gpus)
    refuse(recipe, layout, data_size)
    counted, began = count(recipe, layout.tensor), time.monotonic()
    bounds = list(pairwise(stage_bounds([cost.flops for cost in counted.costs], layout.pipeline)))
    shape = counted.zero_shape(layout, data_size, recipe.precision == "bf16")
    with fake_world(gpus, rank):
        start()
        topology, stage = Topology(layout), meta_stage(recipe)
        with torch.device("meta"):
            apply_tensor_parallel(stage.model, stage.layers, tensor_plan(preset_of(recipe)), topology.tensor_group)
        first, end = bounds[topology.pipeline_stage]
        seconds = time.monotonic() - began
        kinds = state_bytes(counted.stage_weights(first, end), counted.num_groups, shape, topology.data_rank)
        layers = f"layers {first}-{end - 1}, {_weights(stage, counted, first, end, rank):,} weights, as planned"
        engine = "no engine: its state is too large to build it here"
        if sum(kinds.values()) <= ENGINE_BYTES:
            engine = _compare_engine(recipe, stage, topology, counted, kinds)
    sizes = ", ".join(f"{kind} {size:,}" for kind, size in kinds.items())
    position = f"tensor rank {topology.tensor_rank}, data rank {topology.data_rank}"
    position += f", pipeline stage {topology.pipeline_stage}"
    return f"rank {rank} of {gpus} ({position}) built in {seconds:.1f} s: {layers}\nbytes: {sizes}\n{engine}"


def _weights(stage: Stage, counted: CountedProgram, first: int, end: int, rank: int) -> int:
    """Return the number of weights in the rank's layers. Raises RuntimeError if the plan has another number."""
    layers = torch.nn.ModuleList(stage.layers[first:end])
    built = sum(parameter.numel() for parameter in layers.parameters())
    planned = sum(weight.numel for weight in counted.stage_weights(first, end))
    if built != planned:
        raise RuntimeError(f"rank {rank} has {built} weights, the plan has {planned}")
    return built


def _compare_engine(
    recipe: Recipe, stage: Stage, topology: Topology, counted: CountedProgram, planned: dict[str, int]
) -> str:
    """Build the engine on weights without values. Raises RuntimeError if its bytes differ from the plan."""
    materialize(torch.nn.ModuleList([stage.model, *stage.layers]))
    name_parameters(stage.model)
    groups = parameter_groups(stage, recipe.optimizer)
    for group in groups:
        group.pop("multiplier")
    engine = Engine(
        stage.layers,
        stage.inputs,
        stage.terms,
        groups,
        OPTIMIZERS[recipe.optimizer.name],
        topology,
        torch.device("cpu"),
        engine_settings(recipe, topology.data_size),
        [cost.flops for cost in counted.costs],
    )
    engine.state.fragments(loading=True)  # makes the optimizer create its moments
    if engine.zero == 3 and (small := engine.deepspeed.optimizer.persistent_parameters):
        small[0].all_gather(small)  # as in the first step: they stay replicated on every rank
    kept = kept_bytes(engine)
    engine.close()
    if differing := {kind: (size, planned[kind]) for kind, size in kept.items() if size != planned[kind]}:
        raise RuntimeError(f"the engine's bytes differ from the plan, (found, planned): {differing}")
    return (
        f"engine: ZeRO {engine.zero}, built on CPU tensors, has the planned {sum(kept.values()):,} bytes of each kind"
    )
