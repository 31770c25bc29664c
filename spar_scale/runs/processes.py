"""Steps that start from one another, each in a process of its own, as many side by side as there are jobs.

The miniature's phases are too small for a thread more to be worth its time, and some do not depend on each
other: two of them on a core each take half the wall time of one after another, for the same core-seconds. One
that no other can run beside leaves a core idle: two data-parallel ranks did phase joint in four fifths of the
time, for half as many core-seconds again. A step is a fork of this process, which has imported what all need
(eight seconds that a new interpreter would pay again) and computes nothing itself. What a step prints is shown
line by line under its name, what it has spent is kept by `spending.py`. A step that fails ends the others; so
do Ctrl-C, SIGTERM and SIGKILL of this process. A training step that is stopped saves first.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from parallel.errors import UserError
from parallel.launch.children import (
    FORK,
    install_child_signal_handlers,
    killed,
    signals_blocked,
    sigterm_interrupts,
    stop,
)
from parallel.launch.imports import import_deepspeed
from spar_scale.runs.board import Board, clock
from spar_scale.runs.spending import Spending, read_spending, unfinish
from spar_scale.training.mlflow_store import load_mlflow
from spar_scale.training.progress import progress_sent_to

BEFORE_FORKS = (
    "deepspeed.pipe",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # by any engine with ZeRO (0.19.8); wraps functions in torch.compile
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "spar_scale.stages.align",
)
GRACE_S = 10.0  # for a step that is asked to stop, until its current computation ends
LOOK_S = 0.5  # between two looks at the clock
BELIEF_S = 30.0  # how many measured seconds weigh as much as what was estimated


@dataclass(frozen=True)
class Step:
    """A piece of work with a name, the names of those it starts from, and a folder that keeps what it has spent.

    `seconds` is what it may take on an idle core: only the time left is made of it. `finished` tells whether it
    need not be done again; without it, that an attempt has come to its end.
    """

    name: str
    folder: Path
    work: Callable[[], object]
    after: tuple[str, ...] = ()
    seconds: float = 1.0
    finished: Callable[[], bool] | None = None

    def is_finished(self) -> bool:
        """Whether its result is there."""
        return self.finished() if self.finished is not None else read_spending(self.folder).finished


@sigterm_interrupts()
def run_steps(steps: Sequence[Step], jobs: int, ended: Callable[[Step], None] = lambda step: None) -> None:
    """Do what is not finished, or starts from what is not; `ended` is called after each step, before any other starts.

    Steps stand after those that they start from. Raises UserError where a step refuses or is killed, SystemExit
    where it fails, KeyboardInterrupt for Ctrl-C and SIGTERM when the steps that ran have stopped and a line has told
    where their results are.
    """
    todo: dict[str, Step] = {}
    for step in steps:
        if not step.is_finished() or any(name in todo for name in step.after):
            todo[step.name] = step
    for step in todo.values():
        unfinish(step.folder)
    board, forecast, running = Board(), Forecast(steps, todo, jobs), dict[str, _Running]()
    try:
        for step in steps:
            if step.name not in todo:
                board.write_line(
                    step.name, f"finished before, with {read_spending(step.folder).core_seconds:.1f} core-seconds"
                )
        while todo:
            for step in todo.values():
                if len(running) < jobs and step.name not in running and not any(name in todo for name in step.after):
                    board.begin(step.name)
                    forecast.begin(step.name)
                    with signals_blocked():  # no Ctrl-C between the start of a process and its place in the list
                        running[step.name] = _Running(step, threads(jobs))
            _listen(running, board, forecast)
            for one in [one for one in running.values() if one.process.exitcode is not None]:
                del running[one.step.name], todo[one.step.name]
                board.end(one.step.name)
                one.close()
                one.check()
                forecast.at(one.step.name, 1, 1)
                total = read_spending(one.step.folder)
                board.write_line(
                    one.step.name, f"done, {total.core_seconds:.1f} core-seconds in {clock(total.wall_seconds)}"
                )
                ended(one.step)
    except KeyboardInterrupt:
        stop([one.process for one in running.values()], GRACE_S)
        board.close()
        print(_interrupted(steps, list(todo), list(running)), file=sys.stderr)
        raise
    finally:
        stop([one.process for one in running.values()], GRACE_S)
        board.close()


def _interrupted(steps: Sequence[Step], todo: Sequence[str], running: Sequence[str]) -> str:
    """What was interrupted, and where the rest lies."""
    folder = os.path.commonpath([step.folder for step in steps])
    return (
        f"interrupted in {', '.join(running) or 'no step'}: {len(steps) - len(todo)} of {len(steps)} steps are "
        f"finished; they and the checkpoints of the others stay in {folder}. The same command resumes from there"
    )


def threads(jobs: int) -> int:
    """The threads of a step: what OMP_NUM_THREADS says, else its share of the cores, of which four are enough."""
    cores = int(os.environ.get("OMP_NUM_THREADS") or min(4, available_cores() // jobs))
    return max(1, cores)


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def import_before_forks(mlflow: bool) -> None:
    """Import here what every step needs, once.

    Nothing of it may compute or look at a GPU, which no fork survives.
    """
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    from parallel.launch.world import device_type

    if device_type() == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import_deepspeed()
    for module in BEFORE_FORKS:
        importlib.import_module(module)
    if mlflow:
        with contextlib.suppress(ImportError):  # of which each run's mirror warns
            load_mlflow()
    from transformers.utils import logging

    logging.disable_progress_bar()
    gc.freeze()  # else each full collection of a step goes over all of it, and copies the pages that it is in: 0.5 s


class Forecast:
    """When all will be done: what was estimated, corrected by the pace so far, and the order in which steps may run."""

    def __init__(self, steps: Sequence[Step], todo: Mapping[str, Step], jobs: int):
        self._steps, self._jobs = [step for step in steps if step.name in todo], jobs
        self._before = sum(step.seconds for step in steps if step.name not in todo)
        self._share = dict.fromkeys(todo, 0.0)
        self._began: dict[str, float] = {}  # the clock when a step started
        self._first: dict[str, tuple[float, float]] = {}  # the clock and the share done when it was first heard of
        self._last: dict[str, float] = {}  # the clock when it sent its last heartbeat

    def begin(self, name: str) -> None:
        """A step starts."""
        self._began[name] = time.monotonic()

    def at(self, name: str, done: int, steps: int) -> None:
        """A step has done `done` of its `steps`; the first time it says so it may go on from an earlier attempt."""
        self._share[name], self._last[name] = done / steps, time.monotonic()
        self._first.setdefault(name, (self._last[name], done / steps))

    def share(self) -> float:
        """The share of all that is done."""
        done = self._before + sum(step.seconds * self._share[step.name] for step in self._steps)
        return done / (self._before + sum(step.seconds for step in self._steps))

    def seconds_left(self) -> float:
        """Seconds until the last step ends: steps run in their order as soon as they may and a job is free."""
        waiting = {step.name: self._seconds_left(step) for step in self._steps if self._share[step.name] < 1}
        after = {step.name: step.after for step in self._steps}
        running: dict[str, float] = {}
        total = 0.0
        while waiting:
            for name in waiting:
                if len(running) < self._jobs and name not in running and not any(p in waiting for p in after[name]):
                    running[name] = waiting[name]
            soonest = min(running.values())
            total += soonest
            for name in list(running):
                running[name] -= soonest
                if running[name] <= 0:
                    del running[name], waiting[name]
        return total

    def _seconds_left(self, step: Step) -> float:
        now = time.monotonic()
        took, did = self._measured(step.name)
        if did > 0:
            left = took / did * (1 - self._share[step.name]) - (now - self._last[step.name])
        else:
            measured = {each: self._measured(each.name) for each in self._steps}
            expected = sum(each.seconds * did for each, (_, did) in measured.items())
            pace = (sum(took for took, did in measured.values() if did) + BELIEF_S) / (expected + BELIEF_S)
            left = step.seconds * pace * (1 - self._share[step.name]) - (now - self._began.get(step.name, now))
        return max(1.0, left)

    def _measured(self, name: str) -> tuple[float, float]:
        """Seconds from the first to the last time that a step was heard of, and the share that it did in them."""
        began, share = self._first.get(name, (0.0, 0.0))
        return self._last.get(name, 0.0) - began, self._share[name] - share


class _Running:
    """A step's process, with what it tells and what it prints."""

    def __init__(self, step: Step, num_threads: int):
        self.step, self.refusal, self._line = step, None, b""
        self.events, events = FORK.Pipe(duplex=False)
        self.output, output = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.process: Any = FORK.Process(target=_work, args=(step, num_threads, os.getpid(), events, output))
        self.process.start()
        events.close()
        os.close(output)

    def new_progress(self) -> list[tuple[int, int, str]]:
        """Return the progress events since the last call; a refusal is kept."""
        received = []
        while self.events.poll():
            try:
                event = self.events.recv()
            except EOFError:
                break
            if isinstance(event, tuple):
                received.append(event)
            else:
                self.refusal = event
        return received

    def new_lines(self) -> list[str]:
        """Return the complete lines printed since the last call, as a terminal would show them."""
        while wait([self.output], timeout=0) and (read := os.read(self.output, 1 << 16)):
            self._line += read
        *lines, self._line = self._line.split(b"\n")
        return [text for line in lines if (text := line.decode(errors="replace").rsplit("\r", 1)[-1].rstrip())]

    def close(self) -> None:
        """Close what it was heard through."""
        self.events.close()
        os.close(self.output)

    def check(self) -> None:
        """Raise where it has not ended well."""
        code, name = self.process.exitcode, self.step.name
        if isinstance(self.refusal, UserError):
            raise UserError(f"{name}: {self.refusal}")
        if self.refusal is not None:
            raise self.refusal
        if code < 0:
            raise UserError(f"{name}: {killed(code)}")
        if code:
            raise SystemExit(f"error: {name} failed; its output is above")


def _listen(running: Mapping[str, _Running], board: Board, forecast: Forecast) -> None:
    """Wait shortly for progress events and printed lines, and show them; after a process has ended, all of its rest."""
    board.tick(forecast.share(), forecast.seconds_left())
    sources = {file: one for one in running.values() for file in (one.events, one.output, one.process.sentinel)}
    for file in wait(list(sources), timeout=LOOK_S):
        one = sources[file]  # pyright: ignore[reportArgumentType]
        if file == one.process.sentinel:
            one.process.join()
        for line in one.new_lines():
            board.write_line(one.step.name, line)
        for done, steps, note in one.new_progress():
            forecast.at(one.step.name, done, steps)
            board.tick(forecast.share(), forecast.seconds_left())
            board.show(one.step.name, done, steps, note)


def _work(step: Step, num_threads: int, parent: int, events: Connection, output: int) -> None:
    """The body of a step's process; exit codes as the command line's."""
    install_child_signal_handlers(parent)
    for number in (1, 2):
        os.dup2(output, number)
    sys.stdout, sys.stderr = (
        open(number, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        for number in (1, 2)
    )
    torch.set_num_threads(num_threads)
    spending, code = Spending(step.folder), 1

    def tell(done: int, steps: int, note: str) -> None:
        spending.record()
        if os.getppid() != parent:  # where the kernel does not end us with it
            raise SystemExit(1)
        events.send((done, steps, note))

    try:
        with progress_sent_to(tell):
            step.work()
        code = 0
    except (UserError, OSError) as error:
        events.send(error)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except SystemExit:  # the reason has been printed
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        spending.record(finished=code == 0)
    raise SystemExit(code)
