"""`spar-scale plan RECIPE --gpus N --rehearse-rank R`: one rank of a large world, built here, against its plan.

Groups, tensor cut, stage cut and shapes are those of the real run, on the meta device. Where what the rank keeps is
small (the miniature's), the engine too is built, on CPU tensors without values, and its bytes are counted; for larger
models the arithmetic stands alone. The two agree to the byte, or it is an error.
"""

from __future__ import annotations

import time
from itertools import pairwise

import torch

from parallel.errors import UserError
from parallel.launch.world import start
from parallel.optimizers import OPTIMIZERS
from parallel.pipeline import stage_bounds
from parallel.planner import CountedProgram
from parallel.rehearsal import fake_world, materialize
from parallel.tensor import apply_tensor_parallel
from parallel.topology import Layout, Topology
from parallel.zero.engine import Engine, name_parameters
from parallel.zero.kept_bytes import kept_bytes
from parallel.zero.state_bytes import state_bytes
from spar_scale.config.recipe import Recipe
from spar_scale.planning.plan import count, refuse
from spar_scale.sharding.cuts import PLAN
from spar_scale.stages import Stage, meta_stage
from spar_scale.training.engine_settings import engine_settings
from spar_scale.training.optimizers import parameter_groups

ENGINE_BYTES = 2**30
"""An engine that keeps more is not built."""


def rehearse(recipe: Recipe, gpus: int, rank: int) -> str:
    """Build rank `rank` of the recipe's own layout on so many GPUs, and compare it with the plan's.

    Raises UserError for a rank or layout that cannot be, RuntimeError where plan and rehearsal differ.
    """
    parallel = recipe.parallel
    layout = Layout(parallel.tensor, parallel.pipeline, parallel.zero)
    if not 0 <= rank < gpus:
        raise UserError(f"--rehearse-rank: found {rank}, must be from 0 to {gpus - 1}, the ranks of {gpus} GPUs")
    data_size = layout.data(gpus)
    refuse(recipe, layout, data_size)
    counted, began = count(recipe, layout.tensor), time.monotonic()
    bounds = list(pairwise(stage_bounds([cost.flops for cost in counted.costs], layout.pipeline)))
    shape = counted.zero_shape(layout, data_size, recipe.precision == "bf16")
    with fake_world(gpus, rank):
        start()
        topology, stage = Topology(layout), meta_stage(recipe)
        with torch.device("meta"):
            apply_tensor_parallel(stage.model, stage.layers, PLAN, topology.tensor_group)
        first, end = bounds[topology.pipeline_stage]
        seconds = time.monotonic() - began
        kinds = state_bytes(counted.stage_weights(first, end), counted.num_groups, shape, topology.data_rank)
        held = f"layers {first}-{end - 1}, {_weights(stage, counted, first, end, rank):,} weights, as planned"
        kept = "no engine: its bytes are too many for here"
        if sum(kinds.values()) <= ENGINE_BYTES:
            kept = _engine_keeps(recipe, stage, topology, counted, kinds)
    told = ", ".join(f"{kind} {size:,}" for kind, size in kinds.items())
    where = f"tensor rank {topology.tensor_rank}, data rank {topology.data_rank}, stage {topology.pipeline_stage}"
    return f"rank {rank} of {gpus} ({where}) built in {seconds:.1f} s: {held}\nbytes: {told}\n{kept}"


def _weights(stage: Stage, counted: CountedProgram, first: int, end: int, rank: int) -> int:
    """The number of weights of the rank's layers; RuntimeError where the plan has another."""
    layers = torch.nn.ModuleList(stage.layers[first:end])
    built = sum(parameter.numel() for parameter in layers.parameters())
    planned = sum(weight.numel for weight in counted.stage_weights(first, end))
    if built != planned:
        raise RuntimeError(f"rank {rank} holds {built} weights by rehearsal and {planned} by the plan")
    return built


def _engine_keeps(
    recipe: Recipe, stage: Stage, topology: Topology, counted: CountedProgram, planned: dict[str, int]
) -> str:
    """Build the engine on weights without values; RuntimeError where it keeps other bytes than planned."""
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
    engine.state.fragments(loading=True)  # has the optimizer make its moments
    if engine.zero == 3 and (small := engine.deepspeed.optimizer.persistent_parameters):
        small[0].all_gather(small)  # as the first step does: they stay whole on every rank
    kept = kept_bytes(engine)
    engine.close()
    if differing := {kind: (size, planned[kind]) for kind, size in kept.items() if size != planned[kind]}:
        raise RuntimeError(f"the engine keeps other bytes than planned: {differing}")
    return f"engine: ZeRO {engine.zero} built on CPU tensors keeps the same {sum(kept.values()):,} bytes, of each kind"
