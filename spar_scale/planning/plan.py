"""`spar-scale plan RECIPE --gpus N --gpu NAME`: estimate all layouts of a recipe on N GPUs, without any GPU.

The training stage is built on the meta device, cut for each tensor-parallel size in a fake world, and counted. It needs
no data, no weights, and no memory of the model's size. The rules for allowed layouts are the same as for a run.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from parallel.costs import layer_costs
from parallel.errors import UserError
from parallel.fake_world import fake_world
from parallel.optimizers import OPTIMIZERS, WHOLE_MATRICES, whole_matrix_groups
from parallel.planner import ASSUMPTIONS, CountedProgram, LayoutEstimate, Machine, Work, estimate_layout
from parallel.tensor import apply_tensor_parallel
from parallel.topology import Layout
from parallel.zero.state_bytes import Weight
from spar_scale.config.recipe import Recipe, flatten
from spar_scale.data.order import micro_steps
from spar_scale.models.sharding import check_tensor, tensor_plan
from spar_scale.phases import phase_of
from spar_scale.planning.gpus import find_gpu
from spar_scale.planning.model_parts import part_of
from spar_scale.stages import meta_stage
from spar_scale.stages.costs import micro_batch
from spar_scale.stages.parts import preset_of
from spar_scale.training.optimizers import parameter_groups

SHOWN = 10
FP32_BYTES = 4
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Plan:
    """All layouts, the fastest first and the refused last, and the operations of a step by part of the model."""

    recipe: Recipe
    machine: Machine
    gpus: int
    estimates: list[LayoutEstimate]
    flops: dict[str, int]
    prompts: str | None = None

    def text(self) -> str:
        """Return a table of the best layouts with the recipe's own marked, and why others are refused."""
        return "\n".join(_lines(self))

    def json(self) -> str:
        """Return all estimates as JSON."""
        layouts = [{**asdict(e), "step_s": e.step_s, "memory_bytes": e.memory_bytes} for e in self.estimates]
        header = {"machine": asdict(self.machine), "gpus": self.gpus, "flops": self.flops, "assumptions": ASSUMPTIONS}
        return json.dumps({**header, "layouts": layouts}, indent=1)


def plan(recipe: Recipe, gpus: int, gpu: str) -> Plan:
    """Estimate all layouts on `gpus` GPUs. Raises UserError for an unknown GPU, or a recipe that cannot be built."""
    machine = find_gpu(gpu)
    counted = {1: count(recipe, 1)}
    estimates = [_estimate(recipe, layout, gpus, machine, counted) for layout in layouts(gpus, machine)]
    estimates.sort(key=lambda e: (e.refused is not None, e.step_s, e.memory_bytes))
    return Plan(recipe, machine, gpus, estimates, _flops(recipe, counted[1], gpus), _prompts(recipe))


def layouts(gpus: int, machine: Machine) -> Iterator[Layout]:
    """Yield all layouts whose sizes divide `gpus`, with tensor-parallel ranks within one node."""
    for tensor in (size for size in range(1, machine.gpus_per_node + 1) if gpus % size == 0):
        rest = gpus // tensor
        for pipeline in (size for size in range(1, rest + 1) if rest % size == 0):
            for zero in (1, 2, 3):
                yield Layout(tensor, pipeline, zero)


def count(recipe: Recipe, tensor: int) -> CountedProgram:
    """Return the counts of the recipe's training stage under a tensor-parallel size, for one micro-batch."""
    with fake_world(tensor, 0) as group:
        stage = meta_stage(recipe)
        with torch.device("meta"):
            apply_tensor_parallel(stage.model, stage.layers, tensor_plan(preset_of(recipe)), group)
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
        weights |= {names[id(parameter)]: Weight(parameter.numel(), index) for parameter in _in_optimizer_order(group)}
    return CountedProgram(
        parameter_names=[frozenset(names[id(parameter)] for parameter in layer.parameters()) for layer in stage.layers],
        weights=weights,
        costs=costs,
        num_groups=len(groups),
        states=[OPTIMIZERS[recipe.optimizer.name].state_of(group) for group in groups],
        whole_matrices=whole_matrix_groups(groups),
        beside_bytes=[sum(map(_whole_bytes, layer.beside)) for layer in stage.layers],
    )


def _whole_bytes(module: nn.Module) -> int:
    """Return the bytes of a module that a rank holds whole in fp32; trained, it has a gradient and two moments."""
    return sum(
        FP32_BYTES * parameter.numel() * (4 if parameter.requires_grad else 1) for parameter in module.parameters()
    )


def _prompts(recipe: Recipe) -> str | None:
    """Describe the prompts that are counted; None for a phase that draws no pictures from prompts."""
    if "objective.caption_dropout" not in phase_of(recipe).reads:
        return None
    if recipe.data.plan_tokens is not None:
        return f"prompts of {recipe.data.plan_tokens} tokens beside their picture (data.plan_tokens)"
    longest = f"prompts of {preset_of(recipe).conditioning.max_words} tokens, the longest that are read"
    return f"{longest}: set data.plan_tokens to the mean of your data"


def _in_optimizer_order(group: dict[str, Any]) -> list[Any]:
    """Return a group's parameters in the optimizer's order: DeepSpeed's Muon (0.19.8) sorts by shape, largest first."""
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
    """Raise UserError if the recipe's rules, its preset or its batch do not allow a layout."""
    sizes = {f"parallel.{key}": value for key, value in asdict(layout).items()}
    values = dict(flatten(recipe.model_dump())) | sizes
    if broken := [f"{key}: {rule}" for key, rule in Recipe.contradictions(values.__getitem__)]:
        raise UserError("; ".join(broken))
    check_tensor(preset_of(recipe), layout.tensor)
    if data_size > recipe.data.task_block:
        raise UserError(
            f"{data_size} data ranks share each task block of {recipe.data.task_block} samples, so some have none;"
            f" data.task_block={data_size} gives each rank one"
        )


def _flops(recipe: Recipe, counted: CountedProgram, gpus: int) -> dict[str, int]:
    """Return the operations of a step by part of the model, for all samples, largest first."""
    flops: defaultdict[str, int] = defaultdict(int)
    for names, cost in zip(counted.parameter_names, counted.costs, strict=True):
        flops[part_of(names)] += cost.flops * recipe.global_batch // recipe.parallel.micro_batch
    return dict(sorted(flops.items(), key=lambda item: -item[1]))


def _lines(plan: Plan) -> Iterator[str]:
    recipe, machine = plan.recipe, plan.machine
    total = sum(plan.flops.values())
    title = f"{recipe.stage}/{recipe.phase}, preset {recipe.model.preset}, {recipe.precision}"
    yield f"{title}, on {plan.gpus} x {machine.name}"
    shares = ", ".join(f"{part} {flops / total:.0%}" for part, flops in plan.flops.items() if flops)
    yield f"{total / 1e12:,.1f} TFLOP per step of {recipe.global_batch} samples: {shares}"
    if plan.prompts is not None:
        yield plan.prompts
    yield ""
    yield "  tensor pipeline data zero   step   samples/s  GiB/GPU  compute tensor  data  pipe bubble  padding"
    good = [estimate for estimate in plan.estimates if estimate.refused is None]
    own = [estimate for estimate in plan.estimates if _is_own(recipe, estimate)]
    shown = good[:SHOWN] + [estimate for estimate in own if estimate.refused is None and estimate not in good[:SHOWN]]
    yield from (_row(estimate, recipe) for estimate in shown)
    if len(good) > len(shown):
        yield f"  and {len(good) - len(shown)} more that fit"
    for estimate in own:
        if estimate.refused is not None:
            yield f"the recipe's own layout, {_name(estimate)}: {estimate.refused}"
    if not own:
        yield f"the recipe's own layout does not divide {plan.gpus} GPUs"
    yield from _memory_lines(good[:1])
    yield from _refused_lines(plan)
    yield "assumed:"
    yield from (f"  {assumption}" for assumption in ASSUMPTIONS)


def _is_own(recipe: Recipe, estimate: LayoutEstimate) -> bool:
    parallel = recipe.parallel
    return estimate.layout == Layout(parallel.tensor, parallel.pipeline, parallel.zero)


def _row(estimate: LayoutEstimate, recipe: Recipe) -> str:
    layout, mark = estimate.layout, "*" if _is_own(recipe, estimate) else " "
    share = {kind: seconds / estimate.step_s for kind, seconds in estimate.seconds.items()}
    return (
        f"{mark} {layout.tensor:6} {layout.pipeline:8} {estimate.data_size:4} {layout.zero:4}"
        f" {estimate.step_s:7.3f}s {recipe.global_batch / estimate.step_s:9,.0f} {estimate.memory_bytes / 2**30:8.1f}"
        f" {share['compute']:8.0%} {share['tensor']:6.0%} {share['data']:5.0%} {share['pipeline']:5.0%}"
        f" {share['bubble']:6.0%} {estimate.padding:8.0%}"
    )


def _memory_lines(best: list[LayoutEstimate]) -> Iterator[str]:
    for estimate in best:
        kinds = ", ".join(f"{kind} {size / 2**30:.2f}" for kind, size in estimate.memory.items())
        sent = ", ".join(f"{kind} {size / 2**30:.2f}" for kind, size in estimate.traffic.items())
        yield ""
        yield f"fastest layout, {_name(estimate)}: GiB on its fullest GPU: {kinds}; GiB sent per step: {sent}"


def _refused_lines(plan: Plan) -> Iterator[str]:
    # Reasons that differ only in numbers are printed once.
    by_reason: defaultdict[str, list[LayoutEstimate]] = defaultdict(list)
    for estimate in plan.estimates:
        if estimate.refused is not None:
            by_reason[re.sub(r"[\d.]+", "", estimate.refused)].append(estimate)
    if by_reason:
        yield "not possible (--json lists each with its reason):"
    for estimates in by_reason.values():
        more = f" and {len(estimates) - 1} more like it" if len(estimates) > 1 else ""
        yield f"  {_name(estimates[0])}{more}: {estimates[0].refused}"


def _name(estimate: LayoutEstimate) -> str:
    layout = estimate.layout
    return f"tp{layout.tensor}-pp{layout.pipeline}-dp{estimate.data_size}-z{layout.zero}"
