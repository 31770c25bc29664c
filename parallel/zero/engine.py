"""The engine: runs a program under DeepSpeed ZeRO stages 1, 2 and 3, with fp32 master weights and an EMA.

The objective is the same under every layout: sum_b weight_b * sum_t coefficient_t * term_t[b] / global_batch, over all
micro-steps and data-parallel ranks. DeepSpeed averages over both, so the loss is first multiplied by their numbers. The
EMA of a parameter is one more flat tensor in the optimizer state, so it is partitioned, saved and resumed like a
moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parallel.launch.world import silenced
from parallel.optimizers import WHOLE_MATRICES, Optimizer
from parallel.pipeline import pipeline_batches, pipeline_module, receive_into_new_buffers
from parallel.program import Layer, Program
from parallel.topology import Topology
from parallel.zero.config import EngineSettings, deepspeed_config
from parallel.zero.state import ZeroState


@dataclass
class StepRecord:
    """The results of one step, on the device: weighted sums of the terms (T,), the norm, and whether it was skipped."""

    terms: Tensor
    grad_norm: Tensor
    skipped: bool


class Engine:
    """One trained program under one layout.

    `groups` are the optimizer's parameter groups over the whole model, each with a unique `name`. Parameters have their
    global name in the attribute `global_name`. `costs` are the costs of each layer, which only the pipeline cut uses.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        inputs: Sequence[str],
        terms: Mapping[str, float],
        groups: Sequence[Mapping[str, Any]],
        optimizer: Optimizer,
        topology: Topology,
        device: torch.device,
        settings: EngineSettings,
        costs: Sequence[float] = (),
    ):
        import deepspeed

        self.topology, self.device, self.settings, self.optimizer = topology, device, settings, optimizer
        self.zero = topology.layout.zero
        self.coefficients = torch.tensor(list(terms.values()), dtype=torch.float32, device=device)
        self.terms = torch.zeros(len(terms), dtype=torch.float64, device=device)
        # Undoes DeepSpeed's averages over data-parallel ranks and accumulated micro-steps.
        self.scale = settings.micro_steps * topology.data_size / settings.global_batch
        program = Program(layers, inputs, list(terms), settings.recompute)
        self.inputs = program.boundaries[0]  # in the order in which the first pipeline stage unpacks them
        self.pipelined = topology.layout.pipeline > 1
        if self.pipelined:
            module: Any = pipeline_module(program, topology, self._loss, len(groups), costs)
            dummies: list[nn.Parameter] = list(module.dummies)
        else:
            module, dummies = program, []
        inner = optimizer.build(_local_groups(groups, module, dummies))
        inner.register_step_post_hook(self._update_ema)  # runs only for applied updates: DeepSpeed skips the others
        whole_matrices = any(group.get(WHOLE_MATRICES) for group in groups)
        with silenced():
            engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=inner,
                config=deepspeed_config(self.zero, topology.data_size, settings, whole_matrices),
                mpu=None if self.pipelined else topology.grid,
                dist_init_required=False,
            )
        if self.pipelined:
            receive_into_new_buffers(engine, device)
        self.deepspeed: Any = engine
        self.state: Any = ZeroState(engine, self.zero, topology.tensor_rank, optimizer)

    def step(self, batches: Iterator[Mapping[str, Any]], lr: Mapping[str, float]) -> StepRecord:
        """Run one optimizer step over `micro_steps` micro-batches; `lr` maps a group's name to its rate.

        If the gradient norm is not finite, DeepSpeed skips the update; the record reports it.
        """
        for group in self.deepspeed.optimizer.optimizer.param_groups:
            group["lr"] = lr[group["name"]]
        self.terms.zero_()
        with self.optimizer.step_context(self.device):
            self._run(batches)
        optimizer = self.deepspeed.optimizer
        norm = torch.as_tensor(optimizer._global_grad_norm, dtype=torch.float64, device=self.device)
        return StepRecord(self.terms.clone(), norm.clone().reshape(()), bool(optimizer.overflow))

    def _run(self, batches: Iterator[Mapping[str, Any]]) -> None:
        """Run forward and backward passes of the micro-batches, then the update."""
        if self.pipelined:
            self.deepspeed.reset_activation_shape()  # shapes may differ between steps, by the task of the batch
            self.deepspeed.train_batch(pipeline_batches(batches, self.inputs, self.device))
            return
        for _ in range(self.settings.micro_steps):
            batch = next(batches)
            slots = {name: batch[name].to(self.device, non_blocking=True) for name in self.inputs}
            weight = batch["weight"].to(self.device, non_blocking=True)
            loss = self._loss(self.deepspeed(slots), weight)
            self.deepspeed.backward(loss)
            self.deepspeed.step()

    def close(self) -> None:
        """Remove DeepSpeed's hooks and release the memory, so that another engine can be created."""
        self.deepspeed.destroy()
        self.deepspeed = self.state = None

    # -- loss and EMA -------------------------------------------------------------------------

    def _loss(self, terms: Tensor, weight: Tensor) -> Tensor:
        # `where` before the product: a bad sample may give NaN, and NaN * 0 is NaN.
        weighted = torch.where(weight[:, None] > 0, terms, 0.0) * weight[:, None]
        self.terms += weighted.detach().sum(dim=0).double() / self.settings.global_batch
        return (weighted * self.coefficients).sum() * self.scale

    @torch.no_grad()
    def _update_ema(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for flat in group["params"]:
                optimizer.state[flat]["ema"].lerp_(flat, 1.0 - self.settings.ema_decay)


def name_parameters(model: nn.Module) -> None:
    """Store each parameter's name in the model as its `global_name`, which checkpoints use under every layout."""
    for name, parameter in model.named_parameters():
        parameter.global_name = name  # type: ignore[attr-defined]


def _local_groups(
    groups: Sequence[Mapping[str, Any]], module: nn.Module, dummies: Sequence[nn.Parameter]
) -> list[dict[str, Any]]:
    """Return the groups with only the parameters of this rank's pipeline stage, each with its dummy in a pipeline."""
    held = {id(parameter) for parameter in module.parameters()}
    local = []
    for index, group in enumerate(groups):
        parameters = [parameter for parameter in group["params"] if id(parameter) in held]
        parameters += dummies[index : index + 1]
        if parameters:
            local.append({**group, "params": parameters})
    return local
