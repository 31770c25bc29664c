"""The engine: DeepSpeed ZeRO 1, 2 and 3 around a program, with fp32 masters and an EMA beside them.

What is optimised is the sum of design rule "weights": sum_b weight_b * sum_t coefficient_t *
term_t[b] / global_batch, over all micro-steps and data ranks, whatever the layout. DeepSpeed
averages over both, so the loss is multiplied by their number first. Every DeepSpeed key is written
out, because its defaults clip at 1.0 and accumulate bf16 gradients in bf16. The EMA of a parameter
is one more flat tensor in the optimizer state, so it is partitioned, saved and resumed like one.

Written against DeepSpeed 0.19.8; it reads the private attributes named in `fragments`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.boxes import Fragment
from parallel.launch import silenced
from parallel.muon import muon_step
from parallel.pipeline import pipeline_batches, pipeline_module
from parallel.program import Layer, Program
from parallel.topology import Topology


@dataclass(frozen=True)
class EngineSettings:
    """The part of a recipe that the engine needs."""

    precision: str
    micro_batch: int
    micro_steps: int
    global_batch: int
    clip: float
    ema_decay: float
    recompute: bool = False


@dataclass
class StepRecord:
    """What one step leaves on the device: weighted sums of the terms (T,), the norm, and whether it was applied."""

    terms: Tensor
    grad_norm: Tensor
    skipped: bool


class Engine:
    """One trained program under one layout.

    `groups` are the optimizer's parameter groups over the whole model, each with a unique `name`;
    parameters carry their global name as `global_name`. `make_optimizer` builds the inner optimizer.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        inputs: Sequence[str],
        terms: Mapping[str, float],
        groups: Sequence[Mapping[str, Any]],
        make_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        topology: Topology,
        device: torch.device,
        settings: EngineSettings,
    ):
        import deepspeed

        self.topology, self.device, self.settings = topology, device, settings
        self.zero = topology.layout.zero
        self.inputs = tuple(inputs)
        self.coefficients = torch.tensor(list(terms.values()), dtype=torch.float32, device=device)
        self.terms = torch.zeros(len(terms), dtype=torch.float64, device=device)
        # Undo DeepSpeed's averages: over data ranks and over accumulated micro-steps.
        self.scale = settings.micro_steps * topology.data_size / settings.global_batch
        program = Program(layers, inputs, list(terms), settings.recompute)
        self.pipelined = topology.layout.pipeline > 1
        # Muon's update is orthogonalised before the norm is taken: what is logged is the norm of that update.
        self.muon = any(group.get("use_muon") for group in groups)
        if self.pipelined:
            module: Any = pipeline_module(program, topology, self._loss, len(groups))
            dummies: list[nn.Parameter] = list(module.dummies)
        else:
            module, dummies = program, []
        optimizer = make_optimizer(_local_groups(groups, module, dummies))
        optimizer.register_step_post_hook(self._update_ema)
        with silenced():
            engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                config=deepspeed_config(self.zero, topology.data_size, settings, self.muon),
                mpu=None if self.pipelined else topology.grid,
                dist_init_required=False,
            )
        self.deepspeed: Any = engine
        self._fill_state()

    def step(self, batches: Iterator[Mapping[str, Any]], lr: Mapping[str, float]) -> StepRecord:
        """One optimizer step over `micro_steps` micro-batches; `lr` maps group name to its rate.

        A non-finite gradient norm skips the update (DeepSpeed's own check) and is reported.
        """
        for group in self.deepspeed.optimizer.optimizer.param_groups:
            group["lr"] = lr[group["name"]]
        self.terms.zero_()
        with muon_step(self.device) if self.muon else nullcontext():
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

    def fragments(self, loading: bool = False) -> list[Fragment]:
        """Writable flat views of what this rank keeps of every trained parameter: master, moments, EMA.

        To save, each element belongs to one rank; to load, a rank asks for all it needs (Muon under
        ZeRO 1 and 2 keeps the momentum of whole matrices on every rank that holds a part of one).
        """
        if self.zero == 3:
            return list(self._fragments_zero3())
        return [fragment for piece in self._fragments_zero12() for fragment in self._with_momentum(piece, loading)]

    def optimizer_steps(self) -> dict[str, int]:
        """Applied updates by parameter group (Adam's bias correction counts them)."""
        steps = {}
        for group, flat in self._flats():
            count = self._inner_state()[flat].get("step", group.get("step", 0))
            steps[group["name"]] = int(count)
        return steps

    def restore(self, optimizer_steps: Mapping[str, int]) -> None:
        """After a load into `fragments`: set the step counts and copy the masters to the weights."""
        for group, flat in self._flats():
            count, state = optimizer_steps.get(group["name"], 0), self._inner_state()[flat]
            if "step" in state:
                state["step"] = torch.full_like(state["step"], count) if torch.is_tensor(state["step"]) else count
            if "step" in group:
                group["step"] = count
        self._masters_to_weights()

    def close(self) -> None:
        """Remove DeepSpeed's hooks and let the memory go, so that another engine can follow."""
        self.deepspeed.destroy()
        self.deepspeed = None

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

    # -- DeepSpeed's private state --------------------------------------------------------------

    def _inner_state(self) -> Any:
        return self.deepspeed.optimizer.optimizer.state

    def _flats(self) -> list[tuple[dict[str, Any], Tensor]]:
        """(parameter group, flat fp32 master partition) pairs of the inner optimizer."""
        wrapped = self.deepspeed.optimizer
        groups = wrapped.optimizer.param_groups
        if self.zero == 3:
            flats = enumerate(wrapped.fp32_partitioned_groups_flat)
            return [(groups[wrapped.sub_group_to_group_id[index]], flat) for index, flat in flats]
        return [(group, flat) for group in groups for flat in group["params"]]

    def _fill_state(self) -> None:
        """Create the optimizer state by hand, so a checkpoint can be loaded before any step."""
        for group, flat in self._flats():
            state = self._inner_state()[flat]
            if group.get("use_muon"):
                state["momentum_buffer"] = torch.zeros_like(flat.data)
                if matrices := self._whole_matrices(flat):
                    state["momentum_buffer"] = flat.new_zeros(sum(p.numel() for p in matrices), requires_grad=False)
            else:
                step = torch.zeros((), dtype=torch.float32, device=flat.device)
                state.setdefault("step", 0 if "use_muon" in group else step)
                state["exp_avg"] = torch.zeros_like(flat.data)
                state["exp_avg_sq"] = torch.zeros_like(flat.data)
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
        wrapped = self.deepspeed.optimizer
        flats = [flat for _, flat in self._flats()]
        for parameter in self._trained():
            share = parameter.ds_tensor.ds_numel
            start = dist.get_rank(parameter.ds_process_group) * share
            length = max(0, min(share, parameter.ds_numel - start))
            index, offset, _ = wrapped.grad_position[wrapped.get_param_id(parameter)]
            if length:
                yield self._fragment(parameter, parameter.ds_shape, start, flats[index], offset, length)

    def _whole_matrices(self, flat: Tensor) -> list[Any]:
        """The matrices whose whole momentum lies beside this flat partition, in order (Muon under ZeRO 1 and 2)."""
        held = getattr(self.deepspeed.optimizer, "params_in_partition", None)  # ZeRO 3 and its bf16 class have none
        for index, (group, other) in enumerate(self._flats()):
            if other is flat and group.get("use_muon") and held is not None:
                return list(held[index])
        return []

    def _with_momentum(self, piece: tuple[Fragment, Any, Tensor], loading: bool) -> Iterator[Fragment]:
        fragment, parameter, flat = piece
        offset = 0
        for matrix in self._whole_matrices(flat):
            if matrix is parameter:
                momentum = self._inner_state()[flat]["momentum_buffer"].narrow(0, offset, parameter.numel())
                if loading:
                    yield replace(fragment, start=0, tensors={"momentum_buffer": momentum})
                else:
                    length = fragment.tensors["model"].numel()
                    fragment.tensors["momentum_buffer"] = momentum.narrow(0, fragment.start, length)
            offset += matrix.numel()
        yield fragment

    def _fragment(
        self, parameter: Any, shape: Sequence[int], start: int, flat: Tensor, offset: int, length: int
    ) -> Fragment:
        state = self._inner_state()[flat]
        alike = {kind: value for kind, value in state.items() if torch.is_tensor(value) and value.dim() == 1}
        if self._whole_matrices(flat):
            del alike["momentum_buffer"]  # laid out otherwise; `_with_momentum` adds it
        tensors = {"model": flat.data, **alike}
        cut = getattr(parameter, "tensor_cut", None)
        return Fragment(
            name=parameter.global_name,
            shape=tuple(shape),
            start=start,
            tensors={kind: tensor.narrow(0, offset, length) for kind, tensor in tensors.items()},
            cut=cut,
            writes=cut is not None or self.topology.tensor_rank == 0,
        )

    def _trained(self) -> Iterator[Any]:
        for parameter in self.deepspeed.module.parameters():
            if parameter.requires_grad and hasattr(parameter, "global_name"):  # dummies have no name
                yield parameter

    @torch.no_grad()
    def _masters_to_weights(self) -> None:
        wrapped = self.deepspeed.optimizer
        if self.zero < 3:
            wrapped.update_lp_params()
            return
        for index in range(len(wrapped.fp32_partitioned_groups_flat)):
            wrapped._reassign_or_swap_out_partitioned_parameters(index)
        if wrapped.persistent_parameters:
            wrapped.persistent_parameters[0].all_gather(wrapped.persistent_parameters)


def deepspeed_config(zero: int, data_size: int, settings: EngineSettings, muon: bool = False) -> dict[str, Any]:
    """DeepSpeed's configuration with every key that matters written out; offload, MoE and fp16 are never on."""
    half = settings.precision == "bf16"
    return {
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": settings.micro_steps,
        "train_batch_size": settings.micro_batch * settings.micro_steps * data_size,
        "gradient_clipping": settings.clip,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": half, "immediate_grad_update": False, "check_grad_overflow": half},
        "fp16": {"enabled": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "dump_state": False,
        "zero_optimization": {
            "stage": zero,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_scatter": not muon,  # Muon orthogonalises whole matrices and refuses it
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
            "round_robin_gradients": False,
            "elastic_checkpoint": False,
            "ignore_unused_parameters": True,
            "sub_group_size": 1_000_000_000,
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 10_000,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "stage3_gather_16bit_weights_on_model_save": False,
            "memory_efficient_linear": False,  # it replaces torch.nn.functional.linear for the whole process
        },
    }


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
