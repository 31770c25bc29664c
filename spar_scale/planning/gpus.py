"""GPUs with the published figures of their manufacturers: dense peaks without sparsity, one direction of a link.

Memory is in decimal gigabytes, as advertised; a device shows a few percent more. The network is one adapter per GPU, as
in the manufacturer's eight-GPU servers: 400 Gb/s, for the A100 200 Gb/s.
"""

from __future__ import annotations

from parallel.errors import UserError, nearest
from parallel.planner import Machine

GPUS = {
    machine.name: machine
    for machine in (
        Machine("h200", 141e9, 989e12, 67e12, 450e9, 50e9),
        Machine("h100-80", 80e9, 989e12, 67e12, 450e9, 50e9),
        Machine("a100-80", 80e9, 312e12, 19.5e12, 300e9, 25e9),
        Machine("b200", 180e9, 2250e12, 75e12, 900e9, 50e9),
    )
}


def find_gpu(name: str) -> Machine:
    """Return the GPU of a name. Raises UserError for an unknown one."""
    if name not in GPUS:
        raise UserError(f"--gpu: found '{name}', must be one of {', '.join(GPUS)}{nearest(name, GPUS)}")
    return GPUS[name]
