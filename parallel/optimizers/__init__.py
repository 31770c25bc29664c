"""The optimizers by the names of the recipe: how each is built, what state it keeps, what it demands of a run.

One table. The recipe's schema and rules read the names and demands, the engine the state that it creates before the
first step, the planner that state's bytes. To add an optimizer that updates each weight by itself (most of torch's
do) add an entry to OPTIMIZERS; a test compares the declared state with the state after a step.

The trade-off of declaring the state: torch's optimizers create theirs at their first step, but a checkpoint is loaded
before any step. Nothing here imports torch or DeepSpeed before an optimizer is built, so the table costs no start-up.

Left out: `torch.optim.Muon` (2.13). It accepts 2-D parameters only, and ZeRO hands every optimizer flat 1-D
partitions; DeepSpeed's Muon orthogonalises before it partitions.
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
    """What an optimizer keeps for one parameter group, beside the fp32 master weights and the EMA.

    `tensors` hold one fp32 number for each weight, 0 at the start. `scalars` are one number for the group, by name
    with the value at the start; they live where `scalars_on` names: as a tensor on the weights' `device`, as a tensor
    on the `host` (what torch reads there costs no synchronisation), or as a `number` of Python.
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
    """A value that a recipe's key must have with an optimizer; `reason` completes "with optimizer.name X, ..."."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Optimizer:
    """One optimizer. `build(groups)` returns it over parameter groups that hold lr, betas, eps and weight_decay.

    `matrices` is the state of groups whose matrices are updated as a whole (`WHOLE_MATRICES`), None for an optimizer
    that has no such groups. `step_context(device)` is entered around each step. `norm_of` says what the logged
    norm is the norm of.
    """

    build: Callable[[Groups], Any]
    state: GroupState = GroupState()
    matrices: GroupState | None = None
    demands: tuple[Demand, ...] = ()
    norm_of: Literal["gradient", "update"] = "gradient"
    step_context: Callable[[Any], AbstractContextManager[None]] = lambda device: contextlib.nullcontext()

    def state_of(self, group: Mapping[str, Any]) -> GroupState:
        """The state of one parameter group."""
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

    return MuonWithAuxAdam(groups)  # without an Adam of its own it uses its inline one, which needs no compiler


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
            Demand("precision", "fp32", "which is proven in fp32 only"),
        ),
        norm_of="update",  # it is orthogonalised before the norm is taken
        step_context=muon_step,
    ),
    "apex_adam": Optimizer(_apex_adam),
    "deepspeed_adam": Optimizer(_deepspeed_adam),
}
"""Name -> optimizer. `adamw` is torch's fused AdamW; `muon` takes hidden matrices and leaves the rest to AdamW."""


def whole_matrix_groups(groups: Iterable[Mapping[str, Any]]) -> frozenset[int]:
    """Indexes of the groups whose matrices are updated as a whole."""
    return frozenset(index for index, group in enumerate(groups) if group.get(WHOLE_MATRICES))
