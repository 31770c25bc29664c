"""`spar-scale doctor`: check which packages are installed, whether they work together, and what is missing.

A package is checked by importing the symbols that are used, not by its name: the package `apex` of the package index is
another project, and an uninstalled package of kernels can leave an empty `flash_attn`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

PACKAGES = (
    "torch", "deepspeed", "transformers", "diffusers", "webdataset", "pydantic", "numpy", "safetensors", "pillow",
)  # fmt: skip
ROOM_BYTES = 2 * 10**9
"""Free disk space below which the demo is likely to fail."""


@dataclass(frozen=True)
class Finding:
    """One line of the report. With `bad`, the doctor exits with 1; `absent` means that an optional part is missing."""

    state: Literal["ok", "absent", "bad"]
    subject: str
    text: str


def report() -> int:
    """Print every finding; return 1 if one of them prevents training, else 0."""
    findings = list(examine())
    for finding in findings:
        print(f"{finding.state:>6}  {finding.subject:<12} {finding.text}")
    bad = [finding.subject for finding in findings if finding.state == "bad"]
    print(f"not ready to run: {', '.join(bad)}" if bad else "ready to run")
    return 1 if bad else 0


def examine() -> Iterator[Finding]:
    """Yield the findings: machine, packages, torch's build, attention, apex, our own packages."""
    yield _python()
    yield _machine()
    yield _disk(Path.cwd())
    yield from (_package(name) for name in PACKAGES)
    yield _torch()
    yield _torchvision()
    yield from _attention()
    yield apex()
    yield our_parallel()


def apex() -> Finding:
    """Check apex by importing the two symbols that FusedAdam needs."""
    try:
        importlib.import_module("amp_C").multi_tensor_adam  # noqa: B018 (proves a CUDA build)
        importlib.import_module("apex.optimizers").FusedAdam  # noqa: B018
    except Exception as error:
        if "pyramid" in _summary("apex").lower():
            return Finding("bad", "apex", "another project of this name is installed; uninstall it")
        return Finding("absent", "apex", f"optimizer.name apex_adam is not available ({type(error).__name__}: {error})")
    return Finding("ok", "apex", "FusedAdam with CUDA kernels")


def our_parallel() -> Finding:
    """Check that `import parallel` finds the package of this project (another project has the same package name)."""
    ours = Path(__file__).resolve().parents[2] / "parallel"
    found = Path(importlib.import_module("parallel").__file__ or "?").resolve().parent
    if found != ours:
        return Finding("bad", "parallel", f"found {found}, must be {ours}; uninstall the other package `parallel`")
    return Finding("ok", "parallel", str(found))


def _python() -> Finding:
    supported = (3, 11) <= sys.version_info[:2] <= (3, 12)
    version = platform.python_version()
    return Finding("ok" if supported else "bad", "python", version + ("" if supported else ", must be 3.11 or 3.12"))


def _machine() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory()
    room = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB of memory free"
    return Finding("ok", "machine", f"{platform.machine()}, {cores} cores, {room}")


def _disk(path: Path) -> Finding:
    free = shutil.disk_usage(path).free
    enough = free >= ROOM_BYTES
    text = f"{free / 1e9:.1f} GB free here" + ("" if enough else f", the demo needs {ROOM_BYTES / 1e9:.0f} GB")
    return Finding("ok" if enough else "bad", "disk", text)


def _package(name: str) -> Finding:
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if not _has_cuda() else "cuda")
    try:
        importlib.import_module({"pillow": "PIL"}.get(name, name))
        return Finding("ok", name, importlib.metadata.version(name))
    except Exception as error:
        return Finding("bad", name, f"cannot be imported ({type(error).__name__}: {error})")


def _torch() -> Finding:
    try:
        import torch
    except Exception:
        return Finding("bad", "torch build", "unknown: torch cannot be imported")
    if torch.version.cuda is None:
        return Finding("ok", "torch build", "CPU only")
    if not torch.cuda.is_available():
        return Finding("ok", "torch build", f"for CUDA {torch.version.cuda}, but no GPU is visible: runs on the CPU")
    devices = ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
    return Finding("ok", "torch build", f"for CUDA {torch.version.cuda}: {devices}")


def _torchvision() -> Finding:
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return Finding("absent", "torchvision", "not needed")
    except Exception as error:
        return Finding(
            "bad", "torchvision", f"its build does not match torch, so packages that import it fail ({error})"
        )
    return Finding("ok", "torchvision", "not needed, imports")


def _attention() -> Iterator[Finding]:
    try:
        import torch

        from spar_scale.ops.attention import BACKENDS, resolve, why_not
    except Exception as error:
        yield Finding("bad", "attention", f"{type(error).__name__}: {error}")
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in (torch.float32, torch.bfloat16):
        backend, reason = resolve(device, dtype)
        yield Finding("ok", "attention", f"{str(dtype).removeprefix('torch.')} on {device}: {backend} ({reason})")
    refusals = {name: why_not(name, device, torch.bfloat16) for name in BACKENDS}
    absent: dict[str, list[str]] = {}
    for name, refusal in refusals.items():
        if refusal:
            absent.setdefault(": ".join(refusal), []).append(name)
    text = "".join(f"; not {', '.join(names)} ({refusal})" for refusal, names in absent.items())
    yield Finding("ok", "attention", f"available: {', '.join(name for name in BACKENDS if not refusals[name])}{text}")


def _has_cuda() -> bool:
    try:
        import torch
    except Exception:
        return False
    return torch.cuda.is_available()


def _summary(distribution: str) -> str:
    try:
        return importlib.metadata.metadata(distribution)["Summary"] or ""
    except importlib.metadata.PackageNotFoundError:
        return ""
