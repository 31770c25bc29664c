"""A small network, such as a discriminator, that is trained beside the engine and replicated on every rank.

It runs in fp32 with plain AdamW. Its gradients are summed over the data-parallel ranks like the engine's (not averaged,
because the loss is already divided by the global batch). So its weights are equal on all ranks and its losses do not
depend on the layout. Tensor-parallel ranks see the same samples and compute the same sum, each in its own data group.
Its state is stored as whole tensors in the checkpoint. The trade-off: it is not sharded, because it is small.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.topology import Topology


class Replica:
    """One module with its optimizer. `name` is the prefix of its tensors in a checkpoint."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        topology: Topology,
        device: torch.device,
        betas: tuple[float, float],
        weight_decay: float = 0.0,
    ):
        self.name, self.module = name, module.float().to(device)
        self.group: dist.ProcessGroup = topology.grid.get_data_parallel_group()
        self.parameters = dict(module.named_parameters())
        decays = {True: weight_decay, False: 0.0}  # as in the engine: vectors, which are biases and norms, have none
        groups = [
            {"params": [p for p in self.parameters.values() if (p.dim() > 1) is matrix], "weight_decay": decay}
            for matrix, decay in decays.items()
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas)
        for parameter in self.parameters.values():
            self.optimizer.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over the data-parallel ranks."""
        total = values.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def step(self, lr: float, clip: float) -> Tensor:
        """Sum the accumulated gradients over the data-parallel ranks, clip, update, clear; return the unclipped norm.

        If the norm is not finite, no rank updates its weights.
        """
        gradients = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for parameter in self.parameters.values()
        ]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, group=self.group)
        norm = flat.norm()
        if torch.isfinite(norm):
            if clip > 0:
                flat *= (clip / (norm + 1e-6)).clamp(max=1.0)
            pieces = flat.split([gradient.numel() for gradient in gradients])
            for parameter, piece in zip(self.parameters.values(), pieces, strict=True):
                parameter.grad = piece.view_as(parameter)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """Return weights, moments and step counts by name, which a checkpoint saves and loads in place."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            tensors[f"{self.name}.{name}"] = parameter.data
            state: dict[str, Any] = self.optimizer.state[parameter]
            for kind in ("exp_avg", "exp_avg_sq", "step"):
                tensors[f"{self.name}.{name}.{kind}"] = state[kind]
        return tensors
