"""The table of optimizers, by their names in recipes: how each is built, its state, and its requirements on a recipe.

The recipe's schema uses the names and requirements, the engine creates the declared state before the first step, and
the planner counts its bytes. To add an optimizer that updates each weight separately (as most in torch do), add an
entry to OPTIMIZERS; a test compares the declared state with the state after a step.

The state must be declared, because torch's optimizers create it in their first step, but a checkpoint is loaded before
any step. The table imports torch and DeepSpeed only when an optimizer is built, so it does not slow down commands.

`torch.optim.Muon` (2.13) is not included: it accepts only 2-D parameters, but ZeRO passes flat 1-D partitions to every
optimizer. DeepSpeed's Muon orthogonalises before it partitions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

from parallel.optimizers.fused_adam import apex_fused_adam, deepspeed_fused_adam
from parallel.optimizers.muon import muon_step

Groups = list[dict[str, Any]]
SCALAR_BYTES = 4
WHOLE_MATRICES = "use_muon"
"""Key of a parameter group whose matrices are updated as a whole; DeepSpeed (0.19.8) reads it by this name."""


@dataclass(frozen=True)
class GroupState:
    """The optimizer state of one parameter group, without the fp32 master weights and the EMA.

    `tensors` have one fp32 number per weight, initially 0. `scalars` have one number per group: name -> initial value.
    `scalars_on` says where they are: a tensor on the weights' `device`, a tensor on the `host` (which torch reads
    without synchronisation), or a Python `number`.
    """

    tensors: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    scalars: Mapping[str, float] = field(default_factory=lambda: {"step": 0.0})
    scalars_on: Literal["device", "host", "number"] = "device"

    @property
    def scalar_bytes(self) -> int:
        """Bytes of the scalars that are tensors."""
        return 0 if self.scalars_on == "number" else SCALAR_BYTES * len(self.scalars)


@dataclass(frozen=True)
class Demand:
    """A value that a recipe's key must have for an optimizer; `reason` completes "with optimizer.name X, ..."."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Optimizer:
    """One optimizer. `build(groups)` returns it for parameter groups with lr, betas, eps and weight_decay.

    `matrices` is the state of groups whose matrices are updated as a whole (`WHOLE_MATRICES`), None if the optimizer
    has no such groups. `step_context(device)` is a context for each step. `norm_of` says whether the logged norm is
    that of the gradient or of the update.
    """

    build: Callable[[Groups], Any]
    state: GroupState = GroupState()
    matrices: GroupState | None = None
    demands: tuple[Demand, ...] = ()
    norm_of: Literal["gradient", "update"] = "gradient"
    step_context: Callable[[Any], AbstractContextManager[None]] = lambda device: contextlib.nullcontext()

    def state_of(self, group: Mapping[str, Any]) -> GroupState:
        """Return the state of one parameter group."""
        return self.matrices if self.matrices is not None and group.get(WHOLE_MATRICES) else self.state


def _adamw(groups: Groups) -> Any:
    import torch

    return torch.optim.AdamW(groups, fused=True)


def _nadam(groups: Groups) -> Any:
    import torch

    return torch.optim.NAdam(groups, decoupled_weight_decay=True)


def _radam(groups: Groups) -> Any:
    import torch

    return torch.optim.RAdam(groups, decoupled_weight_decay=True)


def _apex_adam(groups: Groups) -> Any:
    return apex_fused_adam()(groups, adam_w_mode=True)


def _deepspeed_adam(groups: Groups) -> Any:
    return deepspeed_fused_adam()(groups, adam_w_mode=True)


def _muon(groups: Groups) -> Any:
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    return MuonWithAuxAdam(groups)  # without another Adam it uses its inline one, which needs no compiler


OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(_adamw),
    "nadam": Optimizer(_nadam, GroupState(scalars={"step": 0.0, "mu_product": 1.0}, scalars_on="host")),
    "radam": Optimizer(_radam, GroupState(scalars_on="host")),
    "muon": Optimizer(
        _muon,
        GroupState(scalars_on="number"),
        matrices=GroupState(("momentum_buffer",), scalars={}),
        demands=(
            Demand("parallel.tensor", 1, "which needs whole matrices"),
            Demand("parallel.pipeline", 1, "which needs whole matrices"),
            Demand("optimizer.clip", 0, "whose update is not a gradient"),
            Demand("precision", "fp32", "which is tested in fp32 only"),
        ),
        norm_of="update",  # DeepSpeed orthogonalises before it computes the norm
        step_context=muon_step,
    ),
    "apex_adam": Optimizer(_apex_adam),
    "deepspeed_adam": Optimizer(_deepspeed_adam),
}
"""Name -> optimizer. `adamw` is torch's fused AdamW; `muon` updates hidden matrices and uses AdamW for the rest."""


def whole_matrix_groups(groups: Iterable[Mapping[str, Any]]) -> frozenset[int]:
    """Return the indexes of the groups whose matrices are updated as a whole."""
    return frozenset(index for index, group in enumerate(groups) if group.get(WHOLE_MATRICES))
