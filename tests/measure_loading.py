"""Measure seconds and peak memory of loading published parts at real size; a command for people, not a test.

    python tests/measure_loading.py write spar_1b DIR         random weights in the published layouts (3.7 GB)
    python tests/measure_loading.py load spar_1b DIR [bf16]   one line a part, each in a process of its own

Peak memory is the resident set (files that are mapped count) above what the process had after its imports.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import torch

from spar_scale.files import random_weights
from spar_scale.models.presets import PRESETS
from spar_scale.models.published import PretrainedPart

LOADERS: dict[str, Any] = {
    "mllm": lambda part, preset: preset.language.load(part, preset.vision),
    "vision tower of mllm": lambda part, preset: preset.vision.load(part),
    "diffusion": lambda part, preset: preset.diffusion.load(part),
    "pixel_autoencoder": lambda part, preset: preset.autoencoder.load(part)[0],
}
GIB = 2**30


def write(name: str, folder: Path) -> None:
    preset = PRESETS[name]
    random_weights.write_mllm(folder / "mllm", preset)
    # Sana_600M is one file; Sana_1600M is two of fp32.
    shards, dtype = (1, torch.bfloat16) if name == "spar_1b" else (2, torch.float32)
    random_weights.write_diffusion(folder / "diffusion", preset, dtype, shards)
    random_weights.write_autoencoder(folder / "pixel_autoencoder", preset, torch.bfloat16)


def memory(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak since the last reset."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def load(name: str, folder: Path, what: str, precision: str) -> None:
    preset = PRESETS[name]
    part: Any = PretrainedPart(what.split()[-1], folder / what.split()[-1], name)
    if precision == "bf16":
        part = PretrainedPart(what.split()[-1], folder / what.split()[-1], name, torch.bfloat16)
    with torch.device("meta"):
        LOADERS[what](part, preset)  # imports and caches
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts again
    began = time.monotonic()
    model = LOADERS[what](part, preset)
    took = time.monotonic() - began
    kept = sum(parameter.nbytes for parameter in model.parameters()) / GIB
    peak = (memory("VmHWM") - before) / GIB
    print(f"{name} {what}, {precision}: {took:.1f} s, peak {peak:.2f} GiB, weights {kept:.2f} GiB, {peak / kept:.2f} x")


if __name__ == "__main__":
    command, size, directory = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    if command == "write":
        write(size, directory)
    for part_name in LOADERS if command == "load" else ():
        arguments = (size, directory, part_name, *(sys.argv[4:] or ["fp32"]))
        child = multiprocessing.get_context("spawn").Process(target=load, args=arguments)
        child.start()
        child.join()
