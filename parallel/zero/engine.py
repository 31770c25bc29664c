"""The engine: DeepSpeed ZeRO 1, 2 and 3 around a program, with fp32 masters and an EMA beside them.

What is optimised is the sum of design rule "weights": sum_b weight_b * sum_t coefficient_t *
term_t[b] / global_batch, over all micro-steps and data ranks, whatever the layout. DeepSpeed
averages over both, so the loss is multiplied by their number first. Every DeepSpeed key is written
out, because its defaults clip at 1.0 and accumulate bf16 gradients in bf16. The EMA of a parameter
is one more flat tensor in the optimizer state, so it is partitioned, saved and resumed like one.
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
    """What one step leaves on the device: weighted sums of the terms (T,), the norm, and whether it was applied."""

    terms: Tensor
    grad_norm: Tensor
    skipped: bool


class Engine:
    """One trained program under one layout.

    `groups` are the optimizer's parameter groups over the whole model, each with a unique `name`;
    parameters carry their global name as `global_name`. `optimizer` is what updates them.
    `costs` are what each layer costs; a pipeline is cut by them, nothing else reads them.
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
        # Undo DeepSpeed's averages: over data ranks and over accumulated micro-steps.
        self.scale = settings.micro_steps * topology.data_size / settings.global_batch
        program = Program(layers, inputs, list(terms), settings.recompute)
        self.inputs = program.boundaries[0]  # what the first stage unpacks, in its order
        self.pipelined = topology.layout.pipeline > 1
        if self.pipelined:
            module: Any = pipeline_module(program, topology, self._loss, len(groups), costs)
            dummies: list[nn.Parameter] = list(module.dummies)
        else:
            module, dummies = program, []
        inner = optimizer.build(_local_groups(groups, module, dummies))
        inner.register_step_post_hook(self._update_ema)
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
        """One optimizer step over `micro_steps` micro-batches; `lr` maps group name to its rate.

        A non-finite gradient norm skips the update (DeepSpeed's own check) and is reported.
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
        """Forward and backward over the micro-batches, then the update."""
        if self.pipelined:
            self.deepspeed.reset_activation_shape()
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
        """Remove DeepSpeed's hooks and let the memory go, so that another engine can follow."""
        self.deepspeed.destroy()
        self.deepspeed = self.state = None

    # -- loss and EMA -------------------------------------------------------------------------

    def _loss(self, terms: Tensor, weight: Tensor) -> Tensor:
        counted = torch.where(weight[:, None] > 0, terms, 0.0) * weight[:, None]
        self.terms += counted.detach().sum(dim=0).double() / self.settings.global_batch
        return (counted * self.coefficients).sum() * self.scale

    @torch.no_grad()
    def _update_ema(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for flat in group["params"]:
                optimizer.state[flat]["ema"].lerp_(flat, 1.0 - self.settings.ema_decay)


def name_parameters(model: nn.Module) -> None:
    """Stamp each parameter with its name in the model: the name it has in every checkpoint and layout."""
    for name, parameter in model.named_parameters():
        parameter.global_name = name  # type: ignore[attr-defined]


def _local_groups(
    groups: Sequence[Mapping[str, Any]], module: nn.Module, dummies: Sequence[nn.Parameter]
) -> list[dict[str, Any]]:
    """The groups restricted to the parameters this rank's stage holds, each with its dummy in a pipeline."""
    held = {id(parameter) for parameter in module.parameters()}
    local = []
    for index, group in enumerate(groups):
        parameters = [parameter for parameter in group["params"] if id(parameter) in held]
        parameters += dummies[index : index + 1]
        if parameters:
            local.append({**group, "params": parameters})
    return local
