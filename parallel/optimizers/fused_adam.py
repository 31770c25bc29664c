"""Fused Adam kernels of other packages, detected by importing the symbol itself.

The package name is not sufficient: the package `apex` of the package index is not NVIDIA's.
"""

from __future__ import annotations

from typing import Any

from parallel.errors import UserError


def apex_fused_adam() -> Any:
    """Return NVIDIA apex's FusedAdam. Raises UserError if it is not installed with CUDA kernels."""
    try:
        from amp_C import multi_tensor_adam  # noqa: F401  # pyright: ignore  (proves a CUDA build)
        from apex.optimizers import FusedAdam  # pyright: ignore
    except Exception as error:
        raise UserError(
            f"optimizer.name: found 'apex_adam', but NVIDIA apex with CUDA kernels cannot be imported ({error}); "
            "build it from its source repository at a release tag (a package called 'apex' is another project), "
            "or use 'adamw'"
        ) from None
    return FusedAdam


def deepspeed_fused_adam() -> Any:
    """Return DeepSpeed's FusedAdam. Raises UserError without a CUDA device, for which its kernel is compiled."""
    import torch

    if not torch.cuda.is_available():
        raise UserError("optimizer.name: found 'deepspeed_adam', whose kernel needs a CUDA device; use 'adamw'")
    from deepspeed.ops.adam import FusedAdam

    return FusedAdam
