"""Three workarounds for DeepSpeed 0.19.8's Muon, active only during a step.

Convolution weights: its `muon_update` flattens a 4-D gradient and then selects between the flat update and the 4-D
gradient, which fails or broadcasts wrongly. Inside `muon_step` it gets matrices (out, in * kernel). Compilation: a
decorator compiles its iteration, which on a CPU takes minutes and saves seconds; there it runs eagerly. Precision: it
iterates in half precision if torch can; a CPU without matrix units emulates that, 1.2 to 1.7 times slower than fp32;
there it iterates in fp32. Remove each when its canary in tests/unit/test_muon.py fails.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@contextlib.contextmanager
def muon_step(device: torch.device) -> Iterator[None]:
    """Within the context, DeepSpeed's Muon accepts convolution weights; on a CPU it runs uncompiled and in fp32."""
    import torch
    from deepspeed.runtime.zero.muon import original_muon

    original, dtype_of_method = original_muon.muon_update, original_muon.ns_compute_dtype

    def on_matrices(grad: Tensor, momentum: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if grad.dim() == 2:
            return original(grad, momentum, *args, **kwargs)
        return original(grad.flatten(1), momentum.flatten(1), *args, **kwargs).view_as(grad)

    on_cpu = device.type == "cpu"
    stance = torch.compiler.set_stance("force_eager") if on_cpu else contextlib.nullcontext()
    original_muon.muon_update = on_matrices
    if on_cpu:
        original_muon.ns_compute_dtype = lambda method: torch.float32
    try:
        with stance:
            yield
    finally:
        original_muon.muon_update, original_muon.ns_compute_dtype = original, dtype_of_method
