"""A small network trained beside the engine: a discriminator.

It is whole on every rank that computes it, fp32, plain AdamW. Its gradients are summed over the data
ranks as the engine's are (no averages: the loss is already a share of the global batch), so its
weights stay equal everywhere and its curve does not know the layout. Tensor ranks see the same
samples and come to the same sum, each over its own data ranks. Its state is ordinary tensors in
the checkpoint. Too small to be worth sharding: that is the trade-off.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.topology import Topology


class Replica:
    """One module with its optimizer. `name` begins the names of its tensors in a checkpoint."""

    def __init__(
        self, name: str, module: nn.Module, topology: Topology, device: torch.device, betas: tuple[float, float]
    ):
        self.name, self.module = name, module.float().to(device)
        self.group: dist.ProcessGroup = topology.grid.get_data_parallel_group()
        self.parameters = dict(module.named_parameters())
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=0.0, betas=betas, weight_decay=0.0)
        for parameter in self.parameters.values():
            self.optimizer.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def frozen(self, *inputs: Tensor) -> Tensor:
        """Run the module as it is now; gradients reach the inputs but not its weights."""
        weights = {name: parameter.detach() for name, parameter in self.parameters.items()}
        return torch.func.functional_call(self.module, weights, inputs)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the data ranks."""
        total = values.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def step(self, lr: float, clip: float) -> Tensor:
        """Sum the accumulated gradients over data ranks, clip, update, clear; return the norm before clipping.

        Where the norm is not finite nothing changes, on any rank.
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
        """Weights, moments and step counts by name: what a checkpoint saves, and loads in place."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            found[f"{self.name}.{name}"] = parameter.data
            state: dict[str, Any] = self.optimizer.state[parameter]
            for kind in ("exp_avg", "exp_avg_sq", "step"):
                found[f"{self.name}.{name}.{kind}"] = state[kind]
        return found
