"""Companions: networks that train beside the engine, with an optimizer, a precision and a life cycle of their own.

The trainer knows the list `Stage.companions` and this protocol, not the members. Each training step it calls
`begin_step` on every rank, runs the engine, whose layers may use the companion, and calls `end_step`. A discriminator
(`adversary.py`) is one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from parallel.topology import Topology


class Companion(Protocol):
    """What the trainer asks of a companion. All ranks call each method together."""

    @property
    def name(self) -> str:
        """Name of its learning-rate group (`optimizer.groups`), and the beginning of its names in a checkpoint."""
        ...

    def bind(self, topology: Topology, device: torch.device, betas: tuple[float, float]) -> None:
        """Create its optimizer, once, on the ranks of those pipeline stages that compute it."""
        ...

    def begin_step(self, step: int) -> None:
        """Prepare for training step `step`, counted from 1."""
        ...

    def end_step(self, lr: float, clip: float) -> None:
        """Update it after the last micro-batch; `lr` is this step's learning rate of its group."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds of it, saved and loaded in place; nothing on ranks that do not compute it."""
        ...
