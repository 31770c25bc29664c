"""SIGTERM ends a chain of steps as Ctrl-C does: the steps stop first, and a line tells where they lie."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from parallel.launch.exit_codes import INTERRUPTED
from spar_scale.cli import main
from spar_scale.runs import demo
from spar_scale.runs.processes import Step, run_steps


def steps_of(folder: Path, number: signal.Signals, stopping: signal.Signals | None = None) -> list[Step]:
    """One step that ends, and one that has its parent signalled, and once more when it is asked to stop itself."""

    def signal_parent() -> None:
        (folder / "pid").write_text(str(os.getpid()))
        try:
            os.kill(os.getppid(), number)
            while True:  # signal.pause() would miss a signal that comes just before it
                signal.sigtimedwait([], 0.05)
        finally:
            if stopping is not None:
                os.kill(os.getppid(), stopping)
            (folder / "saved").touch()

    return [Step("a", folder / "a", lambda: None), Step("b", folder / "b", signal_parent, ("a",))]


@pytest.fixture(autouse=True)
def handled():
    """SIGINT raises KeyboardInterrupt also where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("stopping", [None, signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_steps_and_tells_what_is_left(
    tmp_path: Path, capfd, number: signal.Signals, stopping: signal.Signals | None
):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run_steps(steps_of(tmp_path, number, stopping), jobs=1)
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("interrupted in b: 1 of 2 steps are finished; ")
    assert last.endswith(f"stay in {tmp_path}. The same command resumes from there")
    assert (tmp_path / "saved").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_demo_that_gets_sigterm_ends_with_the_code_of_an_interrupt(tmp_path: Path, capfd, monkeypatch):
    monkeypatch.setattr(demo, "import_before_forks", lambda mlflow: None)
    monkeypatch.setattr(demo, "steps_of", lambda chain, size: steps_of(chain.out, signal.SIGTERM))
    assert main(["demo", "--size", "smoke", "--out", str(tmp_path), "--jobs", "1"]) == INTERRUPTED
    said = capfd.readouterr().err
    assert (
        f"interrupted in b: 1 of 2 steps are finished; they and the checkpoints of the others stay in {tmp_path}"
        in said
    )
    assert "Traceback" not in said
