"""Steps side by side: their order, what ends them, what they are said to have cost, when they will be done."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from parallel.errors import UserError
from spar_scale.runs.board import clock
from spar_scale.runs.processes import Forecast, Step, run_steps
from spar_scale.runs.spending import Spending, core_seconds, read_spending
from spar_scale.training.progress import Progress


def burn(seconds: float) -> None:
    """Use so much CPU time."""
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def step(folder: Path, name: str, *after: str, work: Callable[[], object] | None = None) -> Step:
    """A step that notes in `folder/order` that it was done."""

    def done() -> None:
        if work is not None:
            work()
        with open(folder / "order", "a") as order:
            order.write(name + "\n")

    return Step(name, folder / name, done, after)


def order(folder: Path) -> list[str]:
    return (folder / "order").read_text().split()


def test_what_does_not_depend_on_each_other_runs_side_by_side(tmp_path: Path):
    os.mkfifo(tmp_path / "meeting")  # opening either end waits for the other
    here = step(tmp_path, "a", work=lambda: open(tmp_path / "meeting", "rb").close())
    there = step(tmp_path, "b", work=lambda: open(tmp_path / "meeting", "wb").close())
    heard: list[str] = []
    run_steps([here, there, step(tmp_path, "c", "a", "b")], jobs=2, ended=lambda ended: heard.append(ended.name))
    assert order(tmp_path)[-1] == "c" and sorted(heard) == ["a", "b", "c"]


def test_one_job_keeps_to_the_order_given(tmp_path: Path):
    run_steps([step(tmp_path, name) for name in "bdac"], jobs=1)
    assert order(tmp_path) == ["b", "d", "a", "c"]


def test_what_is_finished_is_left_alone_and_what_starts_from_the_rest_is_done_again(tmp_path: Path, capfd):
    def steps() -> list[Step]:
        return [step(tmp_path, "a"), step(tmp_path, "b"), step(tmp_path, "c", "b"), step(tmp_path, "d", "c")]

    run_steps(steps(), jobs=1)
    run_steps(steps(), jobs=1)
    assert order(tmp_path) == ["a", "b", "c", "d"]
    assert capfd.readouterr().err.count("finished before, with") == 4
    (tmp_path / "b" / "spent.json").unlink()
    run_steps(steps(), jobs=1)
    assert order(tmp_path)[4:] == ["b", "c", "d"]


def test_a_refusal_is_told_with_the_name_of_its_step_and_ends_the_others(tmp_path: Path):
    os.mkfifo(tmp_path / "pid")

    def wait_for_the_end() -> None:
        (tmp_path / "number").write_text(str(os.getpid()))
        open(tmp_path / "pid", "wb").close()
        signal.pause()

    def refuse() -> None:
        open(tmp_path / "pid", "rb").close()
        raise UserError("train.steps: found 0")

    with pytest.raises(UserError, match=r"^b: train\.steps: found 0$"):
        run_steps([step(tmp_path, "a", work=wait_for_the_end), step(tmp_path, "b", work=refuse)], jobs=2)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "number").read_text()), 0)
    assert not (tmp_path / "order").exists() and not read_spending(tmp_path / "a").finished


def test_a_defect_keeps_its_traceback_under_the_name_of_its_step(tmp_path: Path, capfd):
    with pytest.raises(SystemExit, match="error: a failed; its output is above"):
        run_steps([step(tmp_path, "a", work=lambda: 1 // 0), step(tmp_path, "b", "a")], jobs=2)
    assert "a: ZeroDivisionError" in capfd.readouterr().err
    assert not (tmp_path / "order").exists()


def test_a_killed_step_is_told_with_its_signal_and_what_helps(tmp_path: Path):
    with pytest.raises(UserError, match=r"a: its process was ended by SIGKILL; .*--jobs 1"):
        run_steps([step(tmp_path, "a", work=lambda: os.kill(os.getpid(), signal.SIGKILL))], jobs=2)


def test_what_a_step_prints_comes_out_under_its_name(tmp_path: Path, capfd):
    def speak() -> None:
        os.write(1, b"half\rwhole\n\n")
        print("to stdout")
        progress = Progress("", 0, 4, enabled=True)
        line = {"step": 3, "terms": {}, "loss": 0.5, "grad_norm": 1.0, "samples_per_s": 7.0}
        progress.show(line)
        progress.close()

    run_steps([step(tmp_path, "a", work=speak)], jobs=1)
    lines = capfd.readouterr().err.splitlines()
    assert lines[:3] == ["a: starts", "a: whole", "a: to stdout"]
    assert lines[3].startswith("a step 3/4  loss 0.5000") and lines[3].endswith("[75% of all, 1 s left]")


def test_core_seconds_are_those_of_all_attempts_and_of_children_dead_and_alive(tmp_path: Path):
    begun = core_seconds()
    spending = Spending(tmp_path)
    read, write = os.pipe()
    children = []
    for lives_on in (False, True):
        if (child := os.fork()) == 0:
            burn(0.15)
            os.write(write, b"x")
            if lives_on:
                signal.pause()
            os._exit(0)
        children.append(child)
    try:
        os.waitpid(children[0], 0)
        while len(os.read(read, 1)) and not _has_burnt(children[1], 0.14):
            os.write(write, b"x")
        burn(0.1)
        first = spending.record()
    finally:
        os.kill(children[1], signal.SIGKILL)
        os.waitpid(children[1], 0)
    assert 0.37 < first.core_seconds < core_seconds() - begun + 0.1
    again = Spending(tmp_path)
    burn(0.1)
    assert again.record(finished=True).core_seconds > first.core_seconds + 0.09
    assert read_spending(tmp_path).finished and read_spending(tmp_path / "nowhere").core_seconds == 0


def _has_burnt(pid: int, seconds: float) -> bool:
    import psutil

    return sum(psutil.Process(pid).cpu_times()[:2]) >= seconds


@pytest.mark.parametrize(("jobs", "expected"), [(1, 100.0), (2, 80.0), (3, 80.0)])
def test_the_time_left_follows_the_order_in_which_steps_may_run(tmp_path: Path, jobs: int, expected: float):
    shape = [("a", 10.0, ()), ("b", 30.0, ()), ("c", 40.0, ("a", "b")), ("d", 10.0, ("a",)), ("e", 10.0, ("c", "d"))]
    steps = [Step(name, tmp_path / name, print, after, seconds) for name, seconds, after in shape]
    forecast = Forecast(steps, {one.name: one for one in steps}, jobs)
    assert forecast.seconds_left() == pytest.approx(expected)
    forecast.begin("a")
    forecast.at("a", 1, 1)
    assert forecast.share() == pytest.approx(0.1)


def test_the_time_left_follows_the_pace_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    steps = [Step(name, tmp_path / name, print, (), 100.0) for name in "ab"]
    forecast, now = Forecast(steps, {one.name: one for one in steps}, 1), 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    forecast.begin("a")
    forecast.at("a", 50, 100)  # goes on from an earlier attempt
    now = 60.0
    forecast.at("a", 70, 100)  # 3 s a step where 1 s was expected
    assert forecast.seconds_left() == pytest.approx(90 + 100 * (60 + 30) / (20 + 30))
    now = 70.0
    assert forecast.seconds_left() == pytest.approx(80 + 100 * (60 + 30) / (20 + 30))


@pytest.mark.parametrize(("seconds", "said"), [(4, "4 s"), (89, "89 s"), (700, "12 min"), (7500, "2 h 05 min")])
def test_seconds_are_said_as_a_person_would(seconds: float, said: str):
    assert clock(seconds) == said
