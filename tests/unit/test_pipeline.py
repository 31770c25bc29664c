"""What we mend of DeepSpeed's pipeline is still broken there, and mended here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from parallel.pipeline import receive_into_new_buffers


def received_dtypes(engine: Any, allocate: Any) -> list[torch.dtype]:
    """Of a slot received into the first place, and of a gradient that follows there, in a middle stage."""
    return [allocate(engine, 0, [2, 2], dtype).dtype for dtype in (torch.uint8, torch.float32)]


def test_canary_deepspeed_receives_a_gradient_into_the_buffer_of_a_slot():
    from deepspeed.runtime.pipe.engine import PipelineEngine

    engine: Any = SimpleNamespace(_grad_layer_buf=[])
    engine._allocate_buffer = lambda shape, dtype, num_buffers: [torch.zeros(shape, dtype=dtype)]
    dtypes = received_dtypes(engine, PipelineEngine._allocate_or_extend_buffers)
    assert dtypes == [torch.uint8, torch.uint8], "mended: remove receive_into_new_buffers"


def test_every_tensor_is_received_into_a_buffer_of_its_own_dtype():
    engine: Any = SimpleNamespace()
    receive_into_new_buffers(engine, torch.device("cpu"))
    dtypes = received_dtypes(engine, lambda engine, *given: engine._allocate_or_extend_buffers(*given))
    assert dtypes == [torch.uint8, torch.float32]
