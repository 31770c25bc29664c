"""What the engine is told, and DeepSpeed's configuration made of it, every key that matters written out.

DeepSpeed's defaults are traps: they clip at 1.0, accumulate bf16 gradients in bf16 and replace torch's
linear for the whole process. Offload, MoE and fp16 are never on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BUCKET = 50_000_000
"""Elements that DeepSpeed reduces or gathers at a time."""
PERSISTENT = 10_000
"""Elements up to which ZeRO-3 leaves a parameter whole on every rank."""


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
    """Return DeepSpeed's configuration with every key that matters written out; offload, MoE and fp16 are never on.

    `whole_matrices` says that the optimizer updates matrices as a whole, so that no rank may keep a part of a gradient.
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
        # Its pipeline would send a slot in pieces over the tensor ranks, of sizes that it takes from another slot.
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
