"""The demo, killed or interrupted: the same again goes on, trains no phase twice, and counts all that was spent."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import yaml
from launching import preload, start_process
from nano import NANO
from tiny_runs import metrics

from spar_scale.runs.processes import BEFORE_FORKS

preload("spar_scale.runs.demo", *BEFORE_FORKS, "nano")

STEPS, LAST = 40, "bootstrap_mllm"


def write_recipes(folder: Path) -> None:
    """Recipes of size smoke on the nano preset; the language model's take long enough to be caught."""
    from spar_scale.runs.chain import RECIPES

    (folder / "smoke").mkdir(parents=True)
    for name in (path.stem for path in (RECIPES / "smoke").glob("*.yaml")):
        changes: dict[str, Any] = {"extends": str(RECIPES / "smoke" / f"{name}.yaml")}
        if name != "world":
            changes["model"] = {"preset": NANO.name}
        if name == LAST:
            changes |= {"train": {"steps": STEPS, "log_every": 1}, "checkpoint": {"every": 10}}
        (folder / "smoke" / f"{name}.yaml").write_text(yaml.safe_dump(changes))


def begin(folder: str) -> None:
    """The demo's steps up to the phase that is caught."""
    from spar_scale.runs import chain, demo, processes

    chain.RECIPES = Path(folder) / "recipes"
    steps = demo.steps_of(chain.Chain(Path(folder) / "out", "smoke", 3), "smoke")
    last = next(number for number, step in enumerate(steps) if step.name == LAST)
    processes.run_steps(steps[: last + 1], jobs=2)


def command(folder: str) -> None:
    """The demo as the command line starts it, with what it says in a file."""
    from spar_scale import cli
    from spar_scale.runs import chain

    chain.RECIPES = Path(folder) / "recipes"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits none
    said = os.open(Path(folder) / "said", os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 2)
    code = cli.main(["demo", "--size", "smoke", "--out", f"{folder}/out", "--seed", "3", "--jobs", "2"])
    (Path(folder) / "code").write_text(str(code))


def caught(process: Any, run_dir: Path, steps: int) -> None:
    """Wait until a run has logged so many steps."""
    log = run_dir / "metrics.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < steps:
        assert process.is_alive(), "it ended before it was caught"
        process.join(0.01)


def test_killed_in_the_middle_it_goes_on_and_counts_both_parts(tmp_path: Path) -> None:
    write_recipes(tmp_path / "recipes")
    first, last = tmp_path / "out" / "bootstrap_autoencoder", tmp_path / "out" / LAST
    process = start_process(begin, str(tmp_path))
    caught(process, last, 15)
    while not (first / "pretrained").is_dir() or not _finished(first):
        process.join(0.01)
    process.kill()
    process.join()
    _until_ended(last)
    before, logged = _spent(last), (first / "metrics.jsonl").stat()
    assert before.core_seconds > 0.5 and not before.finished
    began = time.time()
    process = start_process(begin, str(tmp_path))
    process.join(300)
    assert process.exitcode == 0
    after, again = _spent(last), (first / "metrics.jsonl").stat()
    assert (again.st_ino, again.st_mtime_ns) == (logged.st_ino, logged.st_mtime_ns)
    lines = metrics(last)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    anew = [line["step"] for line in lines if line["time"] > began]
    assert anew[0] in (11, 21, 31) and anew[-1] == STEPS  # from a checkpoint, not from the start
    assert after.finished and after.core_seconds > before.core_seconds + 0.5
    assert after.wall_seconds > before.wall_seconds


def test_ctrl_c_says_how_to_go_on_and_ends_every_process(tmp_path: Path) -> None:
    write_recipes(tmp_path / "recipes")
    process = start_process(command, str(tmp_path))
    caught(process, tmp_path / "out" / LAST, 5)
    os.kill(process.pid, signal.SIGINT)
    process.join(180)
    assert (tmp_path / "code").read_text() == "130"
    said = (tmp_path / "said").read_text()
    assert said.splitlines()[-1] == "stopped; the same command again resumes from here"
    assert "Traceback" not in said
    _until_ended(tmp_path / "out" / LAST, wait_s=0)
    assert len(metrics(tmp_path / "out" / LAST)) < STEPS


def _spent(folder: Path) -> Any:
    from spar_scale.runs.spending import read_spending

    return read_spending(folder)


def _finished(folder: Path) -> bool:
    return _spent(folder).finished


def _until_ended(run_dir: Path, wait_s: float = 20.0) -> None:
    """Take the lock that the run's process held: it is free when that process has ended."""
    from parallel.errors import UserError
    from parallel.launch.run_lock import RunLock

    until = time.monotonic() + wait_s
    while True:
        try:
            return RunLock(run_dir).release()
        except UserError:
            if time.monotonic() > until:
                raise
