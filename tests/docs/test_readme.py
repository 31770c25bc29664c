"""What README shows is true: its commands run (made small), and its refusal reads as printed."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from launching import run_world
from tiny_runs import metrics

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```\w*\n(.*?)```", README, flags=re.S)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith(("spar-scale", "torchrun"))]
SMALL = {
    "make": ["scenes=64", "heldout=8", "edits=8"],
    "train": [
        "train.steps=2",
        "global_batch=8",
        "data.task_block=8",
        "parallel.micro_batch=4",
        "checkpoint.every=2",
        "optimizer.warmup_steps=1",
        "data.workers=0",
    ],
}


def run_in(rank: int, world: int, folder: str, commands: list[list[str]]) -> list[tuple[int, str]]:
    """Run command lines in `folder`; (exit code, stderr) of each."""
    from spar_scale.cli import main

    os.chdir(folder)
    found = []
    for words in commands:
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            found.append((main(words), errors.getvalue()))
    return found


def small(command: str) -> list[str]:
    """The command's words after the program, with overrides that make it quick."""
    words = shlex.split(command)
    kind = next((kind for kind in SMALL if kind in words), "")
    return [*words[1:], *SMALL.get(kind, [])]


@pytest.mark.timeout(400)
def test_the_commands_run_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    commands = [command for command in COMMANDS if command.startswith("spar-scale")]
    assert len(commands) >= 4
    found = run_world(1, run_in, str(tmp_path), [small(c) for c in commands], initialise=False, timeout_s=200)[0]
    for command, (code, errors) in zip(commands, found, strict=True):
        assert code == 0, f"{command}: {errors}"
    launches = [command for command in COMMANDS if command.startswith("torchrun")]
    assert launches
    for command in launches:
        launcher = [sys.executable, "-m", "torch.distributed.run", *small(command)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(launcher, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    assert len(metrics(tmp_path / "runs" / "tiny" / "two")) == 2


def test_the_refusal_reads_as_printed() -> None:
    block = next(block for block in BLOCKS if block.startswith("$ spar-scale"))
    command, _, printed = block.partition("\n")
    done = subprocess.run(
        [sys.executable, "-m", "spar_scale.cli", *shlex.split(command)[2:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == printed


def test_the_map_of_the_house_names_what_is_there() -> None:
    for name in re.findall(r"^\| `([^`]+)`", README, flags=re.M):
        assert (ROOT / name).exists(), name
