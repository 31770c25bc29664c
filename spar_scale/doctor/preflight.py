"""`spar-scale doctor RECIPE`: check whether this machine, and all others of its world, can train a recipe now.

Every rank runs it before a job's training. It takes half a minute, while a bad node would cost hours. Each rank checks
its GPU. The first rank of a node checks disk, shards, shared memory and everything else for which `train` would refuse
the recipe (`training/admission.py`). Then all ranks sum a tensor together. Each rank writes every finding immediately
to its own file in `run_dir/preflight`, so a node that dies or hangs here is recognised by its missing findings.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from parallel.errors import UserError
from parallel.files import write_file
from parallel.launch.environment import read_environment
from parallel.launch.exit_codes import DEFECT, DONE, REFUSED
from parallel.launch.probes import probe_gpu, probe_world, why_no_gpu
from spar_scale.config.recipe import Recipe
from spar_scale.data.spec import sources_of
from spar_scale.doctor.checks import (
    RECIPE,
    check_attention,
    check_packages,
    check_recipe,
    check_shards,
    checkpoint_bytes,
    stage_of,
)
from spar_scale.doctor.machine import Finding

if TYPE_CHECKING:
    from spar_scale.stages import Stage

FOLDER = "preflight"
TOGETHER = "all-reduce"
PROBE_BYTES = 1 << 20
FLOAT_BYTES = 4
PREFETCH = 4
"""Micro-batches that a worker keeps ready, besides the one that it loads (the loader's default)."""


def preflight(recipe: Recipe) -> int:
    """Print and write this rank's findings.

    Returns 0 if it can train, 1 if this machine cannot, 2 if the recipe is refused on every machine.
    """
    rank, world, local_rank = read_environment()
    findings: list[Finding] = []

    def record(new: Iterable[Finding]) -> None:
        for finding in new:
            findings.append(finding)
            if finding.state == "bad" or local_rank == 0:
                print(f"{_host()}: {finding.state:>6}  {finding.subject:<10} {finding.text}", flush=True)
        _write(recipe.run_dir, rank, findings)

    if local_rank == 0:
        stage, refused = stage_of(recipe)
        record(_disk(recipe, rank, stage))
        record(check_packages(recipe))
        record(check_recipe(recipe, world, stage, refused))
        record(check_attention(recipe))
    record(_gpu(local_rank))
    if local_rank == 0:
        record(check_shards(recipe))
        record(_shared_memory(recipe, stage))
    if world > 1:
        record([_probed(TOGETHER, probe_world)])
    bad = {finding.subject for finding in findings if finding.state == "bad"}
    return REFUSED if RECIPE in bad else DEFECT if bad else DONE


def bad_nodes(run_dir: Path, hosts: Sequence[str]) -> dict[str, str]:
    """Return the faults of each bad node, by its name; a node without findings is bad.

    A failed sum over all ranks counts as a node's fault only if no node has a fault of its own, because one bad node
    makes it fail on all.
    """
    own, common = dict[str, list[str]](), dict[str, list[str]]()
    for file in sorted((run_dir / FOLDER).glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        findings = [Finding(**finding) for finding in content["findings"]]
        for faults, shared in ((own, False), (common, True)):
            bad = [
                finding for finding in findings if finding.state == "bad" and (finding.subject == TOGETHER) == shared
            ]
            faults.setdefault(content["host"], []).extend(f"{finding.subject}: {finding.text}" for finding in bad)
    for host in hosts:
        own.setdefault(host, ["no findings: it died or hangs"])
    faults = own if any(own.values()) else common
    return {host: "; ".join(dict.fromkeys(faults[host])) for host in hosts if faults.get(host)}


def forget(run_dir: Path) -> None:
    """Remove the findings of an earlier preflight."""
    for file in (run_dir / FOLDER).glob("*.json"):
        file.unlink()


def _write(run_dir: Path, rank: int, findings: Sequence[Finding]) -> None:
    content = {"host": _host(), "rank": rank, "findings": [asdict(finding) for finding in findings]}
    try:
        (run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
        write_file(run_dir / FOLDER / f"rank-{rank}.json", json.dumps(content))
    except (OSError, UserError):  # reported by the disk finding; for `bad_nodes` this rank has no findings
        return


def _host(environment: Mapping[str, str] = os.environ) -> str:
    """Return the node's name as SLURM knows it."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def _shared_memory(recipe: Recipe, stage: Stage | None, environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """Check that /dev/shm is large enough for the batches that the loader workers of this node keep ready."""
    from spar_scale.data.loader import SHARED_MEMORY

    if stage is None or recipe.data.workers == 0:
        return []
    tasks = environment.get("LOCAL_WORLD_SIZE") or environment.get("SLURM_STEP_TASKS_PER_NODE", "1")
    ranks = re.match(r"\d+", tasks)  # SLURM writes 4(x2)
    batches = int(ranks.group() if ranks else 1) * recipe.data.workers * (PREFETCH + 1)
    needed = batches * recipe.parallel.micro_batch * sample_bytes(recipe, stage)
    return [shared_memory(Path(SHARED_MEMORY), needed)]


def sample_bytes(recipe: Recipe, stage: Stage) -> int:
    """Return the bytes of the largest sample of a batch: its task's slots, its draws and its stored values."""
    from spar_scale.stages.costs import sample_slots
    from spar_scale.training.admission import stored_bytes

    draws = sum(FLOAT_BYTES * math.prod(draw.shape) for draw in stage.sample.draws.values())
    largest = 0
    for source in sources_of(recipe):
        try:
            slots = sample_slots(stage, source)
            stored = stored_bytes(recipe, source.name, stage.sample.num_tokens + stage.sample.image_tokens)
        except UserError:  # reported by the recipe finding
            continue
        own = sum(math.prod(shape) * np.dtype(kind).itemsize for shape, kind in slots.values())
        largest = max(largest, own + stored)
    return largest + draws


def shared_memory(folder: Path, needed: int) -> Finding:
    """Check that a folder of shared memory has `needed` bytes free."""
    try:
        stats = os.statvfs(folder)
    except OSError as error:
        return Finding("absent", "memory", f"{folder}: {error.strerror}; the loader workers use another place")
    size, free = stats.f_blocks * stats.f_frsize, stats.f_bavail * stats.f_frsize
    text = f"{folder}: {free / 1e9:.3f} of {size / 1e9:.3f} GB free, the loader workers need {needed / 1e9:.3f} GB"
    if free >= needed:
        return Finding("ok", "memory", text)
    more = f"docker run --shm-size={-(-(size - free + needed) // 2**30)}g"
    return Finding("bad", "memory", f"{text}; give the container more ({more}), or set data.workers=0")


def _disk(recipe: Recipe, rank: int, stage: Stage | None) -> Iterator[Finding]:
    """Check that the run directory is writable, and on the first rank that the next checkpoint fits."""
    probe = recipe.run_dir / FOLDER / f".probe-{rank}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as stream:
            stream.write(os.urandom(PROBE_BYTES))
            stream.flush()
            os.fsync(stream.fileno())
        probe.unlink()
        stats = os.statvfs(recipe.run_dir)
    except OSError as error:
        yield Finding("bad", "disk", f"{error.filename or recipe.run_dir}: {error.strerror}; run_dir must be writable")
        return
    free = stats.f_bavail * stats.f_frsize
    if rank != 0:
        yield Finding("ok", "disk", f"{recipe.run_dir} can be written")
        return
    needed = checkpoint_bytes(recipe, stage)
    if needed is None:
        yield Finding("ok", "disk", f"{recipe.run_dir}: {free / 1e9:.1f} GB free")
        return
    text = f"{recipe.run_dir}: {free / 1e9:.1f} GB free, the next checkpoint takes {needed / 1e9:.2f} GB"
    yield Finding("ok" if free > needed else "bad", "disk", text)


def _gpu(local_rank: int) -> Iterator[Finding]:
    """Check that this rank has a GPU that torch can use and that multiplies at a plausible speed."""
    device = os.environ.get("SPAR_DEVICE")
    if device == "cpu":
        yield Finding("absent", "gpu", "its checks are skipped on request (SPAR_DEVICE=cpu)")
    elif why := why_no_gpu():
        expected = device == "cuda" or "CUDA_VISIBLE_DEVICES" in os.environ
        yield Finding("bad" if expected else "absent", "gpu", why)
    else:
        yield _probed("gpu", lambda: probe_gpu(local_rank))


def _probed(subject: str, probe: Callable[[], str]) -> Finding:
    try:
        return Finding("ok", subject, probe())
    except UserError as error:
        return Finding("bad", subject, str(error).splitlines()[0])
