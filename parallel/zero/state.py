"""DeepSpeed's state of a model as flat views by global name, which a checkpoint saves and loads.

Uses private attributes of DeepSpeed 0.19.8. ZeRO stages 1 and 2: `_hp_mapping` of a parameter, `params_in_partition`.
ZeRO stage 3: `ds_tensor`, `ds_numel`, `ds_shape`, `ds_process_group` of a parameter, `grad_position`,
`fp32_partitioned_groups_flat`, `sub_group_to_group_id`, `persistent_parameters`. The public functions gather whole
tensors, or omit the moments of all parameter groups but the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.checkpoint.boxes import Fragment
from parallel.optimizers import WHOLE_MATRICES, Optimizer


class ZeroState:
    """Master weights, moments and EMA of a DeepSpeed engine; the constructor creates the optimizer state."""

    def __init__(self, engine: Any, zero: int, tensor_rank: int, optimizer: Optimizer):
        self.module, self.wrapped = engine.module, engine.optimizer
        self.zero, self.tensor_rank, self.optimizer = zero, tensor_rank, optimizer
        self._fill_state()

    def fragments(self, loading: bool = False) -> list[Fragment]:
        """Return writable flat views of this rank's part of every trained parameter: master weights, moments, EMA.

        For saving, each element is in the fragments of one rank. With `loading`, a rank gets fragments for everything
        that it keeps: Muon under ZeRO stages 1 and 2 keeps the momentum of a whole matrix on every rank with a part.
        """
        if self.zero == 3:
            return list(self._fragments_zero3())
        return [fragment for piece in self._fragments_zero12() for fragment in self._with_matrix_state(piece, loading)]

    def scalars(self) -> dict[str, dict[str, float]]:
        """Return the optimizer's scalars by group and name; `step` counts applied updates, for the bias correction."""
        scalars = {}
        for group, flat in self._flats():
            state, names = self._inner_state()[flat], self.optimizer.state_of(group).scalars
            values = {name: float(state[name]) for name in names}
            if "step" in group:  # apex and DeepSpeed count in the group, not in the state
                values["step"] = float(group["step"])
            scalars[group["name"]] = values
        return scalars

    def restore(self, scalars: Mapping[str, Mapping[str, float]]) -> None:
        """Set the optimizer's scalars and copy the master weights to the weights, after a load into `fragments`."""
        for group, flat in self._flats():
            state, values = self._inner_state()[flat], scalars[group["name"]]
            for name, value in values.items():
                state[name] = torch.full_like(state[name], value) if torch.is_tensor(state[name]) else int(value)
            if "step" in group:
                group["step"] = int(values["step"])
        self._masters_to_weights()

    def _inner_state(self) -> Any:
        return self.wrapped.optimizer.state

    def _flats(self) -> list[tuple[dict[str, Any], Tensor]]:
        """Return pairs (parameter group, flat fp32 partition of the master weights) of the inner optimizer."""
        wrapped = self.wrapped
        groups = wrapped.optimizer.param_groups
        if self.zero == 3:
            flats = enumerate(wrapped.fp32_partitioned_groups_flat)
            return [(groups[wrapped.sub_group_to_group_id[index]], flat) for index, flat in flats]
        return [(group, flat) for group in groups for flat in group["params"]]

    def _fill_state(self) -> None:
        """Create the state that the optimizer declares, so that a checkpoint can be loaded before any step."""
        for group, flat in self._flats():
            state, declared = self._inner_state()[flat], self.optimizer.state_of(group)
            matrices = self._whole_matrices(flat)
            numel = sum(matrix.numel() for matrix in matrices) if matrices else flat.numel()
            for name in declared.tensors:
                state[name] = flat.new_zeros(numel, requires_grad=False)
            for name, value in declared.scalars.items():
                if declared.scalars_on == "number":
                    state.setdefault(name, int(value))
                else:
                    device = flat.device if declared.scalars_on == "device" else "cpu"
                    state.setdefault(name, torch.tensor(value, dtype=torch.float32, device=device))
            state["ema"] = flat.detach().clone()

    def _fragments_zero12(self) -> Iterator[tuple[Fragment, Any, Tensor]]:
        flats = [flat for _, flat in self._flats()]
        for parameter in self._trained():
            mapping = parameter._hp_mapping
            if mapping is None:
                continue  # no part of it is in this rank's partition
            flat, place = flats[mapping.param_group_index], mapping.hp_fragment_address
            start = mapping.lp_fragment_address.start
            yield self._fragment(parameter, parameter.shape, start, flat, place.start, place.numel), parameter, flat

    def _fragments_zero3(self) -> Iterator[Fragment]:
        wrapped = self.wrapped
        flats = [flat for _, flat in self._flats()]
        for parameter in self._trained():
            share = parameter.ds_tensor.ds_numel
            start = dist.get_rank(parameter.ds_process_group) * share
            length = max(0, min(share, parameter.ds_numel - start))
            index, offset, _ = wrapped.grad_position[wrapped.get_param_id(parameter)]
            if length:
                yield self._fragment(parameter, parameter.ds_shape, start, flats[index], offset, length)

    def _whole_matrices(self, flat: Tensor) -> list[Any]:
        """Return the matrices whose full momentum this rank keeps with a flat partition (Muon, ZeRO stages 1 and 2)."""
        held = getattr(self.wrapped, "params_in_partition", None)  # ZeRO 3 and its bf16 class have none
        for index, (group, other) in enumerate(self._flats()):
            if other is flat and group.get(WHOLE_MATRICES) and held is not None:
                return list(held[index])
        return []

    def _with_matrix_state(self, piece: tuple[Fragment, Any, Tensor], loading: bool) -> Iterator[Fragment]:
        """Yield the fragment of a parameter with its state of whole matrices; with `loading`, that is a second one."""
        fragment, parameter, flat = piece
        offset = 0
        for matrix in self._whole_matrices(flat):
            if matrix is parameter:
                state = self._inner_state()[flat]
                whole = {name: state[name].narrow(0, offset, parameter.numel()) for name in self._matrix_tensors}
                if loading:
                    yield replace(fragment, start=0, tensors=whole)
                else:
                    length = fragment.tensors["model"].numel()
                    fragment.tensors.update({name: t.narrow(0, fragment.start, length) for name, t in whole.items()})
            offset += matrix.numel()
        yield fragment

    @property
    def _matrix_tensors(self) -> tuple[str, ...]:
        return self.optimizer.matrices.tensors if self.optimizer.matrices is not None else ()

    def _fragment(
        self, parameter: Any, shape: Sequence[int], start: int, flat: Tensor, offset: int, length: int
    ) -> Fragment:
        state = self._inner_state()[flat]
        per_element = {kind: value for kind, value in state.items() if torch.is_tensor(value) and value.dim() == 1}
        if self._whole_matrices(flat):
            for name in self._matrix_tensors:  # have another layout; `_with_matrix_state` adds them
                del per_element[name]
        tensors = {"model": flat.data, **per_element}
        cut = getattr(parameter, "tensor_cut", None)
        return Fragment(
            name=parameter.global_name,
            shape=tuple(shape),
            start=start,
            tensors={kind: tensor.narrow(0, offset, length) for kind, tensor in tensors.items()},
            cut=cut,
            writes=cut is not None or self.tensor_rank == 0,
        )

    def _trained(self) -> Iterator[Any]:
        for parameter in self.module.parameters():
            if parameter.requires_grad and hasattr(parameter, "global_name"):  # dummies have no name
                yield parameter

    @torch.no_grad()
    def _masters_to_weights(self) -> None:
        wrapped = self.wrapped
        if self.zero < 3:
            wrapped.update_lp_params()
            return
        for index in range(len(wrapped.fp32_partitioned_groups_flat)):
            wrapped._reassign_or_swap_out_partitioned_parameters(index)
        if wrapped.persistent_parameters:
            wrapped.persistent_parameters[0].all_gather(wrapped.persistent_parameters)
