"""What README and docs/usage.md show is true: their commands run (made small), the refusal reads as printed."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from launching import run_command, run_world
from tiny_runs import metrics

from spar_scale.config.reference import page

ROOT = Path(__file__).resolve().parents[2]
PAGES = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/usage.md")]
BLOCKS = [block for page in PAGES for block in re.findall(r"```\w*\n(.*?)```", page, flags=re.S)]
PROGRAMS = ("spar-scale ", "torchrun ", "mkdir ", "tar ")
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith(PROGRAMS)]
LAUNCHES = ("torchrun ", "spar-scale parity ", "spar-scale plan ")
"""How commands begin that make worlds of their own, which a daemon may not."""
SMALL_BATCH = ["global_batch=8", "data.task_block=8", "parallel.micro_batch=4"]
SMALL = {
    "make": ["scenes=64", "heldout=8", "edits=8", "heldout_edits=8"],
    "encode": SMALL_BATCH,
    "parity": ["--steps", "2", *SMALL_BATCH],
    "train": [
        "train.steps=2",
        "checkpoint.every=2",
        "optimizer.warmup_steps=1",
        "data.workers=0",
        "tracking.mirror=false",
        *SMALL_BATCH,
    ],
}


def run_in(rank: int, world: int, folder: str, commands: list[list[str]]) -> list[tuple[int, str]]:
    """Run command lines in `folder`, our program's in this process; (exit code, stderr) of each."""
    from spar_scale.cli import main

    os.chdir(folder)
    found = []
    for words in commands:
        if words[0] != "spar-scale":
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            found.append((done.returncode, done.stderr))
            continue
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            found.append((main(words[1:]), errors.getvalue()))
    return found


def small(command: str) -> list[str]:
    """The command's words, with overrides that make it quick."""
    words = shlex.split(command)
    kind = next((kind for kind in SMALL if kind in words), "")
    return [*words, *SMALL.get(kind, [])]


def launch(words: list[str], folder: Path) -> None:
    """Run a command in a process that may start others."""
    if words[0] == "spar-scale":
        return run_command(words[1:], folder)
    line = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_the_commands_run_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    commands = [command for command in COMMANDS if not command.startswith(LAUNCHES)]
    assert len(commands) >= 4
    found = run_world(1, run_in, str(tmp_path), [small(c) for c in commands], initialise=False, timeout_s=500)[0]
    for command, (code, errors) in zip(commands, found, strict=True):
        assert code == 0, f"{command}: {errors}"
    for begins in LAUNCHES:
        launches = [command for command in COMMANDS if command.startswith(begins)]
        assert launches
        for command in launches:
            launch(small(command), tmp_path)
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


def test_the_table_of_folders_names_what_is_there() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `([^`]+)/` \|", page, flags=re.M)
    assert {path.name for path in (ROOT / "spar_scale").iterdir() if (path / "__init__.py").exists()} <= {
        name.removeprefix("spar_scale/") for name in named
    }
    assert [name for name in named if not (ROOT / name).is_dir()] == []


def test_every_link_between_the_pages_leads_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "cluster" / "README.md"]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())]
    assert links
    assert [f"{page.name}: {link}" for page, link in links if not (page.parent / link).exists()] == []


def test_the_reference_of_recipes_is_that_of_the_schema() -> None:
    written = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert written == page(), "run: python -m spar_scale.config.reference > docs/recipes.md"
    assert "| `optimizer.lr` | number, above 0 | required |" in written
