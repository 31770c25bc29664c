"""Test this rank's GPU and the network between the ranks, before a run."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from parallel.errors import UserError
from parallel.launch.world import device_type, meet, stop

MEETING_S = 60.0
"""Time for all ranks to meet: nodes may finish importing torch at very different times."""
MATRIX, MATRIX_FLOPS = 8192, 50e12
"""Size of the bf16 matrix product, and the minimum of operations per second (an A100 has four times as many)."""
SUMMED_BYTES = {"cuda": 256 << 20, "cpu": 1 << 20}
SUMMED_BYTES_PER_S = {"cuda": 1e9, "cpu": 1e5}
"""Minimum rates: on GPUs a tenth of a 100 Gb/s adapter; on CPUs low, to test only that the sum works."""


def why_no_gpu() -> str | None:
    """Return why torch sees no GPU, or None if it sees one."""
    if device_type() == "cuda":
        return None
    if torch.version.cuda is None:
        return "this torch is built for CPUs only"
    try:
        torch.cuda.init()
    except Exception as error:  # torch raises several types
        return f"torch for CUDA {torch.version.cuda} does not match the driver: {error}"
    return "no GPU is visible"


def probe_gpu(local_rank: int) -> str:
    """Return this rank's GPU and its speed as text. Raises UserError if it is missing, fails, or is wrong or slow."""
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"{torch.cuda.device_count()} GPUs are visible, but this is process {local_rank + 1}")
    try:
        flops = _multiply(torch.device("cuda", local_rank))
    except RuntimeError as error:
        raise UserError(f"GPU {local_rank}: {str(error).splitlines()[0]}") from None
    text = f"GPU {local_rank} ({torch.cuda.get_device_name(local_rank)}): {flops / 1e12:.0f} TFLOP/s in bf16"
    if flops < MATRIX_FLOPS:
        raise UserError(f"{text}, below {MATRIX_FLOPS / 1e12:.0f}")
    return text


def probe_world() -> str:
    """Return how fast all ranks sum a tensor, as text. A collective call.

    Raises UserError if the ranks cannot meet, or the sum is wrong or slow.
    """
    try:
        launch = meet(MEETING_S)
        kind = launch.device.type
        values = torch.ones(SUMMED_BYTES[kind] // 4, device=launch.device)
        dist.all_reduce(values)  # not timed: the first call opens the connections
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
