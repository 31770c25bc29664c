"""`spar-scale plan RECIPE --gpus N --gpu NAME`: every layout of a recipe on so many GPUs, before any is rented.

The stage is built on the meta device, cut for each tensor size in a world that is not there, and counted: no data, no
weights, no memory of the model's size. Which layouts are allowed the rules of the recipe say, as for a run.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from parallel.costs import layer_costs
from parallel.errors import UserError
from parallel.optimizers import OPTIMIZERS, WHOLE_MATRICES, whole_matrix_groups
from parallel.planner import ASSUMPTIONS, CountedProgram, LayoutEstimate, Machine, Work, estimate_layout
from parallel.rehearsal import fake_world
from parallel.tensor import apply_tensor_parallel
from parallel.topology import Layout
from parallel.zero.state_bytes import Weight
from spar_scale.config.recipe import Recipe, flatten
from spar_scale.data.order import micro_steps
from spar_scale.planning.gpus import find_gpu
from spar_scale.sharding.costs import micro_batch
from spar_scale.sharding.cuts import PLAN, check_tensor
from spar_scale.sharding.parts import part_of
from spar_scale.stages import meta_stage
from spar_scale.stages.parts import preset_of
from spar_scale.training.optimizers import parameter_groups

SHOWN = 10
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Plan:
    """Every layout, the best first and the refused last; and the operations of a step by part of the model."""

    recipe: Recipe
    machine: Machine
    gpus: int
    estimates: list[LayoutEstimate]
    flops: dict[str, int]

    def text(self) -> str:
        """A table of the best layouts, the recipe's own marked, and why others cannot be."""
        return "\n".join(_lines(self))

    def json(self) -> str:
        """Everything, for programs."""
        layouts = [
            {**asdict(found), "step_s": found.step_s, "memory_bytes": found.memory_bytes} for found in self.estimates
        ]
        told = {"machine": asdict(self.machine), "gpus": self.gpus, "flops": self.flops, "assumptions": ASSUMPTIONS}
        return json.dumps({**told, "layouts": layouts}, indent=1)


def plan(recipe: Recipe, gpus: int, gpu: str) -> Plan:
    """Work out all layouts of `gpus` GPUs; UserError for an unknown GPU or a recipe that no stage can be built of."""
    machine = find_gpu(gpu)
    counted = {1: count(recipe, 1)}
    estimates = [_estimate(recipe, layout, gpus, machine, counted) for layout in layouts(gpus, machine)]
    estimates.sort(key=lambda found: (found.refused is not None, found.step_s, found.memory_bytes))
    return Plan(recipe, machine, gpus, estimates, _flops(recipe, counted[1], gpus))


def layouts(gpus: int, machine: Machine) -> Iterator[Layout]:
    """All layouts that divide so many GPUs, tensor ranks within a node."""
    for tensor in (size for size in range(1, machine.gpus_per_node + 1) if gpus % size == 0):
        left = gpus // tensor
        for pipeline in (size for size in range(1, left + 1) if left % size == 0):
            for zero in (1, 2, 3):
                yield Layout(tensor, pipeline, zero)


def count(recipe: Recipe, tensor: int) -> CountedProgram:
    """The recipe's stage under a tensor size: what its layers hold, and cost on a micro-batch."""
    with fake_world(tensor, 0) as group:
        stage = meta_stage(recipe)
        with torch.device("meta"):
            apply_tensor_parallel(stage.model, stage.layers, PLAN, group)
        costs = layer_costs(
            stage.layers,
            micro_batch(recipe, stage),
            list(stage.terms),
            _DTYPES[recipe.precision],
            recipe.parallel.recompute == "blocks",
        )
    groups = parameter_groups(stage, recipe.optimizer)
    names = {id(parameter): name for name, parameter in stage.model.named_parameters()}
    weights = {name: Weight(p.numel(), None) for name, p in stage.model.named_parameters() if not p.requires_grad}
    for index, group in enumerate(groups):
        weights |= {names[id(parameter)]: Weight(parameter.numel(), index) for parameter in _laid_out(group)}
    return CountedProgram(
        parameter_names=[frozenset(names[id(parameter)] for parameter in layer.parameters()) for layer in stage.layers],
        weights=weights,
        costs=costs,
        num_groups=len(groups),
        states=[OPTIMIZERS[recipe.optimizer.name].state_of(group) for group in groups],
        whole_matrices=whole_matrix_groups(groups),
    )


def _laid_out(group: dict[str, Any]) -> list[Any]:
    """A group's parameters in their optimizer's order: DeepSpeed's Muon (0.19.8) puts the largest shapes first."""
    if not group.get(WHOLE_MATRICES):
        return list(group["params"])
    return sorted(group["params"], key=lambda parameter: parameter.size(), reverse=True)


def _estimate(
    recipe: Recipe, layout: Layout, gpus: int, machine: Machine, counted: dict[int, CountedProgram]
) -> LayoutEstimate:
    size = layout.tensor * layout.pipeline
    data_size, parallel = gpus // size, recipe.parallel
    try:
        refuse(recipe, layout, data_size)
        if layout.tensor not in counted:
            counted[layout.tensor] = count(recipe, layout.tensor)
        steps = micro_steps(recipe.global_batch, recipe.data.task_block, parallel.micro_batch, data_size)
        work = Work(recipe.global_batch, parallel.micro_batch, recipe.precision == "bf16")
        return estimate_layout(counted[layout.tensor], layout, data_size, steps, work, machine)
    except UserError as error:
        return LayoutEstimate(layout, data_size, str(error))


def refuse(recipe: Recipe, layout: Layout, data_size: int) -> None:
    """Raise UserError where the recipe's rules, its preset or its batch do not allow a layout."""
    asked = {f"parallel.{key}": value for key, value in asdict(layout).items()}
    values = dict(flatten(recipe.model_dump())) | asked
    if broken := [f"{key}: {rule}" for key, rule in Recipe.contradictions(values.__getitem__)]:
        raise UserError("; ".join(broken))
    check_tensor(preset_of(recipe), layout.tensor)
    if data_size > recipe.data.task_block:
        raise UserError(
            f"{data_size} data ranks share each task block of {recipe.data.task_block} samples: some would have none;"
            f" data.task_block={data_size} gives each one"
        )


def _flops(recipe: Recipe, counted: CountedProgram, gpus: int) -> dict[str, int]:
    """Operations of a step by part, all samples together, most first."""
    found: defaultdict[str, int] = defaultdict(int)
    for held, cost in zip(counted.parameter_names, counted.costs, strict=True):
        found[part_of(held)] += cost.flops * recipe.global_batch // recipe.parallel.micro_batch
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _lines(plan: Plan) -> Iterator[str]:
    recipe, machine = plan.recipe, plan.machine
    total = sum(plan.flops.values())
    what = f"{recipe.stage}/{recipe.phase}, preset {recipe.model.preset}, {recipe.precision}"
    yield f"{what}, on {plan.gpus} x {machine.name}"
    shares = ", ".join(f"{part} {flops / total:.0%}" for part, flops in plan.flops.items() if flops)
    yield f"{total / 1e12:,.1f} TFLOP a step of {recipe.global_batch} samples: {shares}"
    yield ""
    yield "  tensor pipeline data zero   step   samples/s  GiB/GPU  compute tensor  data  pipe bubble  padding"
    good = [found for found in plan.estimates if found.refused is None]
    own = [found for found in plan.estimates if _is_own(recipe, found)]
    shown = good[:SHOWN] + [found for found in own if found.refused is None and found not in good[:SHOWN]]
    yield from (_row(found, recipe) for found in shown)
    if len(good) > len(shown):
        yield f"  and {len(good) - len(shown)} more that fit"
    for found in own:
        if found.refused is not None:
            yield f"the recipe's own layout, {_name(found)}: {found.refused}"
    if not own:
        yield f"the recipe's own layout does not divide {plan.gpus} GPUs"
    yield from _memory_lines(good[:1])
    yield from _refused_lines(plan)
    yield "assumed:"
    yield from (f"  {assumption}" for assumption in ASSUMPTIONS)


def _is_own(recipe: Recipe, found: LayoutEstimate) -> bool:
    parallel = recipe.parallel
    return found.layout == Layout(parallel.tensor, parallel.pipeline, parallel.zero)


def _row(found: LayoutEstimate, recipe: Recipe) -> str:
    layout, mark = found.layout, "*" if _is_own(recipe, found) else " "
    share = {kind: seconds / found.step_s for kind, seconds in found.seconds.items()}
    return (
        f"{mark} {layout.tensor:6} {layout.pipeline:8} {found.data_size:4} {layout.zero:4}"
        f" {found.step_s:7.3f}s {recipe.global_batch / found.step_s:9,.0f} {found.memory_bytes / 2**30:8.1f}"
        f" {share['compute']:8.0%} {share['tensor']:6.0%} {share['data']:5.0%} {share['pipeline']:5.0%}"
        f" {share['bubble']:6.0%} {found.padding:8.0%}"
    )


def _memory_lines(best: list[LayoutEstimate]) -> Iterator[str]:
    for found in best:
        kinds = ", ".join(f"{kind} {size / 2**30:.2f}" for kind, size in found.memory.items())
        sent = ", ".join(f"{kind} {size / 2**30:.2f}" for kind, size in found.traffic.items())
        yield ""
        yield f"of the first, {_name(found)}, on its fullest GPU in GiB: {kinds}; sent in a step: {sent}"


def _refused_lines(plan: Plan) -> Iterator[str]:
    alike: defaultdict[str, list[LayoutEstimate]] = defaultdict(
        list
    )  # reasons that differ in numbers alone are told once
    for found in plan.estimates:
        if found.refused is not None:
            alike[re.sub(r"[\d.]+", "", found.refused)].append(found)
    if alike:
        yield "cannot be (--json lists each with its reason):"
    for same in alike.values():
        more = f" and {len(same) - 1} more of the kind" if len(same) > 1 else ""
        yield f"  {_name(same[0])}{more}: {same[0].refused}"


def _name(found: LayoutEstimate) -> str:
    layout = found.layout
    return f"tp{layout.tensor}-pp{layout.pipeline}-dp{found.data_size}-z{layout.zero}"
