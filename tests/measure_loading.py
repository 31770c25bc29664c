"""Measure seconds and peak memory of loading published parts at real size; a command for people, not a test.

    python tests/measure_loading.py write spar_1b DIR          random weights in the published layouts (6 GB)
    python tests/measure_loading.py load spar_1b DIR [bf16]    a line for each part, in a process of its own
    python tests/measure_loading.py joint spar_1b DIR [bf16]   phase align joint as a process has it before its engine:
                                                               alone, and as each of two pipeline stages

Peak memory is the resident set (files that are mapped count) above what the process had after its imports.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from parallel.pipeline import stage_bounds
from spar_scale import stages
from spar_scale.config.recipe import load_recipe
from spar_scale.files import random_weights
from spar_scale.models.initialise import initialise
from spar_scale.models.presets import PRESETS
from spar_scale.models.published import PretrainedPart, forget_values, read_weights
from spar_scale.runs.rehearsal.text import write_tokenizer
from spar_scale.stages.costs import pipeline_costs

LOADERS: dict[str, Any] = {
    "mllm": lambda part, preset: preset.language.load(part, preset.vision),
    "vision tower of mllm": lambda part, preset: preset.vision.load(part),
    "diffusion": lambda part, preset: preset.diffusion.load(part),
    "pixel_autoencoder": lambda part, preset: preset.autoencoder.load(part)[0],
    "tokenizer": lambda part, preset: preset.tokenizer.load(part, preset.vision, preset.autoencoder)[0],
}
PARTS = ("mllm", "diffusion", "tokenizer")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GIB = 2**30


def write(name: str, folder: Path) -> None:
    """Write all parts. Sana_600M is one file of bf16 here; Sana_1600M is two of fp32, as published."""
    preset: Any = PRESETS[name]
    shards, dtype = (1, torch.bfloat16) if name == "spar_1b" else (2, torch.float32)
    random_weights.write_mllm(folder / "mllm", preset)
    write_tokenizer(folder / "mllm", None)
    random_weights.write_diffusion(folder / "diffusion", preset, dtype, shards)
    random_weights.write_autoencoder(folder / "pixel_autoencoder", preset, torch.bfloat16)
    tokenizer = preset.tokenizer.build(preset.vision, preset.autoencoder)
    initialise(tokenizer, 0)
    preset.tokenizer.save(tokenizer, folder / "tokenizer", name, 1.0, 1)


def load(name: str, folder: Path, what: str, precision: str) -> None:
    """Measure one part."""
    preset, part = PRESETS[name], what.split()[-1]
    found = PretrainedPart(part, folder / part, name, DTYPES[precision])
    with torch.device("meta"):
        LOADERS[what](found, preset)  # imports and caches
    measure(f"{name} {what}, {precision}", lambda: LOADERS[what](found, preset))


def joint(name: str, folder: Path, what: str, precision: str) -> None:
    """Measure what `Trainer` does up to its engine, for a pipeline stage (such as `0 of 2`)."""
    index, number = (int(word) for word in what.split(" of "))
    settings = [f"model.pretrained.{part}={(folder / part).absolute()}" for part in PARTS]
    settings += [f"precision={precision}", f"parallel.pipeline={number}", "init_from=null", "parallel.micro_batch=1"]
    recipe = load_recipe(f"recipes/{name}/align_joint.yaml", settings)
    costs = pipeline_costs(recipe, stages.meta_stage(recipe))
    bounds = stage_bounds(costs, number) if number > 1 else [0, None]

    def build() -> nn.Module:
        stage = stages.build(recipe, read=False)
        kept = nn.ModuleList(stage.layers[bounds[index] : bounds[index + 1]])
        forget_values(stage.model, {id(parameter) for parameter in kept.parameters()})
        read_weights(kept)
        return kept

    measure(f"{name} align joint, {precision}, pipeline stage {what}", build)


def measure(title: str, act: Callable[[], nn.Module]) -> None:
    """Print seconds, peak memory and the bytes of the parameters that are kept."""

    def memory(key: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))

    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts again
    began, cpu = time.monotonic(), time.process_time()
    model = act()
    took, spent = time.monotonic() - began, time.process_time() - cpu
    kept = sum(parameter.nbytes for parameter in model.parameters()) / GIB
    peak = (memory("VmHWM") - before) / GIB
    text = f"{took:.1f} s ({spent:.1f} CPU-s), peak {peak:.2f} GiB, weights {kept:.2f} GiB, {peak / kept:.2f} x"
    print(f"{title}: {text}", flush=True)


if __name__ == "__main__":
    command, size, directory = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    cases = {"write": [], "load": list(LOADERS), "joint": ["0 of 1", "0 of 2", "1 of 2"]}[command]
    if command == "write":
        write(size, directory)
    for case in cases:
        arguments = (size, directory, case, *(sys.argv[4:] or ["fp32"]))
        child = multiprocessing.get_context("spawn").Process(target=globals()[command], args=arguments)
        child.start()
        child.join()
