"""What this rank's GPU and the network between the ranks can do, tried on them: before a run, not within one."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from parallel.errors import UserError
from parallel.launch.world import device_type, meet, stop

MEETING_S = 60.0
"""For all ranks to meet: one node may import torch so much later than another."""
MATRIX, MATRIX_FLOPS = 8192, 50e12
"""Side of the bf16 product, and the operations a second that a GPU worth using makes (an A100 four times as many)."""
SUMMED_BYTES = {"cuda": 256 << 20, "cpu": 1 << 20}
SUMMED_BYTES_PER_S = {"cuda": 1e9, "cpu": 1e5}
"""A tenth of what one 100 Gb/s adapter moves; on CPUs only that it moves at all."""


def why_no_gpu() -> str | None:
    """Why torch sees no GPU here; None where it sees one."""
    if device_type() == "cuda":
        return None
    if torch.version.cuda is None:
        return "torch here is built for CPUs alone"
    try:
        torch.cuda.init()
    except Exception as error:  # torch says it in several types
        return f"torch for CUDA {torch.version.cuda} and the driver do not agree: {error}"
    return "none is visible"


def probe_gpu(local_rank: int) -> str:
    """Which GPU this rank has and how fast it multiplies; UserError where it is missing, fails, or is wrong or slow."""
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"{torch.cuda.device_count()} are visible, and this is process {local_rank + 1}")
    try:
        flops = _multiply(torch.device("cuda", local_rank))
    except RuntimeError as error:
        raise UserError(f"GPU {local_rank}: {str(error).splitlines()[0]}") from None
    text = f"GPU {local_rank} ({torch.cuda.get_device_name(local_rank)}): {flops / 1e12:.0f} TFLOP/s in bf16"
    if flops < MATRIX_FLOPS:
        raise UserError(f"{text}, below {MATRIX_FLOPS / 1e12:.0f}")
    return text


def probe_world() -> str:
    """How fast all ranks sum a tensor; UserError where they cannot meet, or the sum is wrong or slow. Collective."""
    try:
        launch = meet(MEETING_S)
        kind = launch.device.type
        values = torch.ones(SUMMED_BYTES[kind] // 4, device=launch.device)
        dist.all_reduce(values)  # the first opens the connections
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(values)
        right = bool((values == launch.world**2).all())  # waits for the device
        rate = SUMMED_BYTES[kind] / (time.perf_counter() - began)
        stop()
    except RuntimeError as error:
        raise UserError(str(error).splitlines()[0]) from None
    text = f"{launch.world} ranks, {SUMMED_BYTES[kind] >> 20} MiB at {rate / 1e9:.2f} GB/s"
    if not right:
        raise UserError(f"{text}: the sum is wrong")
    if rate < SUMMED_BYTES_PER_S[kind]:
        raise UserError(f"{text}, below {SUMMED_BYTES_PER_S[kind] / 1e9:g}")
    return text


def _multiply(device: torch.device) -> float:
    """Operations a second of a matrix product; RuntimeError where it is wrong."""
    matrix = torch.eye(MATRIX, dtype=torch.bfloat16, device=device) * 2
    product = matrix @ matrix
    if not torch.equal(product, matrix * 2):
        raise RuntimeError("a matrix product is wrong")
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(10):
        torch.mm(matrix, matrix, out=product)
    torch.cuda.synchronize(device)
    return 10 * 2 * MATRIX**3 / (time.perf_counter() - began)
