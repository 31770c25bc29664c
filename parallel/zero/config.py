"""The engine's settings and the DeepSpeed configuration derived from them.

Every relevant DeepSpeed key is set explicitly, because its defaults are dangerous: they clip at 1.0, accumulate bf16
gradients in bf16 and replace torch's linear function for the whole process. Offload, MoE and fp16 are never enabled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BUCKET = 50_000_000
"""Number of elements that DeepSpeed reduces or gathers at a time."""
PERSISTENT = 10_000
"""ZeRO stage 3 replicates parameters with at most this many elements on every rank."""


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


def deepspeed_config(
    zero: int, data_size: int, settings: EngineSettings, whole_matrices: bool = False
) -> dict[str, Any]:
    """Return DeepSpeed's configuration.

    `whole_matrices` means that the optimizer (Muon) updates matrices as a whole, so gradients must not be scattered.
    """
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
        # The default (0.19.8) sends a slot in parts over the tensor-parallel ranks, with sizes of another slot.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        "zero_optimization": {
            "stage": zero,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_scatter": not whole_matrices,  # DeepSpeed's Muon refuses it
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            "round_robin_gradients": False,
            "elastic_checkpoint": False,
            "ignore_unused_parameters": True,
            "sub_group_size": 1_000_000_000,
            "stage3_prefetch_bucket_size": BUCKET,
            "stage3_param_persistence_threshold": PERSISTENT,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "stage3_gather_16bit_weights_on_model_save": False,
            "memory_efficient_linear": False,  # it replaces torch.nn.functional.linear for the whole process
        },
    }
