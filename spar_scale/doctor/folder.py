"""`spar-scale doctor FOLDER`: everything that a chain of phases lacks before its first job, in one list.

Each recipe is checked as before its training. What an earlier phase of the folder writes need not be there yet, and
what several phases lack is listed once, with their names. GPUs are left to the jobs, which check them on their nodes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from parallel.launch.exit_codes import DEFECT, DONE, REFUSED
from spar_scale.config.recipe import Recipe
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


def check_folder(recipes: Sequence[Recipe]) -> int:
    """Print what the recipes of a chain, in their order, lack; return 0, 1 (the machine) or 2 (a recipe is refused)."""
    lacking: dict[Finding, list[str]] = {}
    before: list[str] = []
    bytes_needed = 0
    for recipe in recipes:
        stage, refused = stage_of(recipe)
        smallest = recipe.parallel.tensor * recipe.parallel.pipeline
        findings = [
            *check_packages(recipe),
            *check_recipe(recipe, smallest, stage, refused, before),
            *check_attention(recipe),
            *check_shards(recipe),
        ]
        for finding in findings:
            if finding.state == "bad":
                lacking.setdefault(finding, []).append(recipe.run_dir.name)
        before.append(recipe.run_dir.name)
        bytes_needed += recipe.checkpoint.keep * (checkpoint_bytes(recipe, stage) or 0)
    room = _room(recipes[0].run_dir, bytes_needed)
    if room.state == "bad":
        lacking[room] = ["all phases"]
    else:
        print(f"    ok  {room.subject}: {room.text}")
    for finding, phases in lacking.items():
        print(f"   bad  {finding.subject}: {finding.text} ({', '.join(phases)})")
    print(f"{len(lacking)} things are missing or wrong" if lacking else "nothing is missing")
    return REFUSED if any(finding.subject == RECIPE for finding in lacking) else DEFECT if lacking else DONE


def _room(run_dir: Path, needed: int) -> Finding:
    """Check that the checkpoints that all phases keep fit on the disk of the runs."""
    folder = next(parent for parent in Path(os.path.abspath(run_dir)).parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    text = f"{folder}: {free / 1e9:.0f} GB free, the checkpoints that all phases keep take {needed / 1e9:.0f} GB"
    return Finding("ok" if free > needed else "bad", "disk", text)
