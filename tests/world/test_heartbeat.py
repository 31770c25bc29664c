"""Runs of several ranks of which one dies, stops, hangs or fails: the others name it and all end in time.

The cases run side by side, each a world of `spar-scale train` processes with their stderr in a file. A fault is put
into `Engine.step` from outside, or is a signal once the run has logged three steps.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from launching import start_process
from tiny_runs import make_data, metrics, phase_values

from parallel.launch.exit_codes import LOST
from parallel.launch.heartbeat import PATIENCE_S
from parallel.launch.world import MARGIN_S

TIMEOUT_S, FEW_S = 8, 20


@dataclass
class Case:
    """What happens to rank `victim` of `world` (or, with `store`, to the store); `message` is what the others say."""

    world: int
    victim: int
    message: str
    fault: str = ""
    signal: int = 0
    store: bool = False
    parallel: dict[str, int] = field(default_factory=dict)


SILENT, STANDS = r"sent its last heartbeat \d+ s ago at step \d+", r"is alive but has been at step 4 for \d+ s"
CASES = {
    "killed": Case(3, 0, SILENT, signal=signal.SIGKILL),
    "stopped": Case(2, 1, SILENT, signal=signal.SIGSTOP),
    "store stopped": Case(
        2, 0, r"sent its last heartbeat \d+ s ago, as was the store", signal=signal.SIGSTOP, store=True
    ),
    "hangs": Case(2, 1, STANDS, fault="hang", parallel={"zero": 2}),
    "hangs in a pipeline": Case(2, 1, STANDS, fault="hang", parallel={"pipeline": 2}),
    "fails": Case(2, 0, r"failed at step 4: ZeroDivisionError: ", fault="fail"),
}
SLOW_S, LONG_S = TIMEOUT_S - 4, TIMEOUT_S + 4
"""What step 2 of one rank takes longer than that of the other, and what step 3 of both takes, before rank 1 hangs."""


def train_rank(rank: int, case: Case, port: int, folder: Path) -> None:
    """One `spar-scale train`, with a fault in its fourth step where it is this rank's turn."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case.world), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True", GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    errors = os.open(folder / f"stderr-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(errors, 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    from parallel.zero.engine import Engine
    from spar_scale.cli import main

    step, steps = Engine.step, itertools.count(1)

    def faulty(*arguments: Any) -> Any:
        number = next(steps)
        if case.fault == "hang":
            time.sleep(SLOW_S * (number == 2 and rank == 0) + LONG_S * (number == 3))
        if case.signal and number > 3:
            time.sleep(0.2)  # no haste: a signal is coming
        if case.fault and number == 4 and rank == case.victim:
            stand_still() if case.fault == "hang" else 1 // 0
        return step(*arguments)

    Engine.step = faulty  # type: ignore[method-assign]
    raise SystemExit(main(["train", str(folder / "recipe.yaml")]))


def hold_store(file: Path) -> None:
    """The part of a launcher that is not there to look after its ranks."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    file.write_text(str(store.port))
    signal.pause()


def stand_still() -> None:
    while True:
        time.sleep(0.01)


@dataclass
class Ended:
    """How the ranks of a case ended: seconds from the fault to the last of them, exit codes, what they said."""

    after_s: float
    codes: list[int]
    said: list[str]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory):
    """All cases, run side by side; a stopped rank is killed in the end, and counts as the signal that stopped it."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    folder = tmp_path_factory.mktemp("heartbeat")
    make_data(folder / "data")
    stores, worlds = [], {}
    for name, case in CASES.items():
        (folder / name).mkdir()
        values = phase_values(
            folder / name / "run", "bootstrap/autoencoder", folder / "data", {}, "nano",
            train={"steps": 10_000, "log_every": 1}, checkpoint={"every": 10_000},
            guards={"timeout_s": TIMEOUT_S}, parallel={"micro_batch": 2, **case.parallel},
        )  # fmt: skip
        (folder / name / "recipe.yaml").write_text(yaml.safe_dump(values))
        if case.store:
            os.mkfifo(folder / name / "port")
            holder = start_process(hold_store, folder / name / "port")
            port = int((folder / name / "port").read_text())
        else:
            stores.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
            port, holder = stores[-1].port, None
        ranks = [start_process(train_rank, rank, case, port, folder / name) for rank in range(case.world)]
        worlds[name] = [*ranks, *([holder] if holder else [])]
    try:
        yield watch(worlds, folder), folder
    finally:
        for process in [process for world in worlds.values() for process in world]:
            process.kill()
            process.join()


def watch(worlds: dict[str, list[Any]], folder: Path) -> dict[str, Ended]:
    """Send each signal when its time has come, and wait for all that are to end by themselves."""
    began, results = {}, {}
    until = time.monotonic() + 400
    while len(results) < len(worlds) and time.monotonic() < until:
        for name, world in worlds.items():
            case, log = CASES[name], folder / name / "run" / "metrics.jsonl"
            ranks = world[: case.world]
            if name not in began and log.exists() and log.read_bytes().count(b"\n") >= 3:
                began[name] = time.monotonic()
                if case.signal:
                    os.kill(world[-1 if case.store else case.victim].pid, case.signal)
            awaited = [process for process in ranks if case.store or not case.signal or process != ranks[case.victim]]
            if name not in results and all(process.exitcode is not None for process in awaited):
                after_s = time.monotonic() - began.get(name, until)
                codes = [-case.signal if process.exitcode is None else process.exitcode for process in ranks]
                said = [(folder / name / f"stderr-{rank}").read_text() for rank in range(case.world)]
                results[name] = Ended(after_s, codes, said)
        time.sleep(0.05)
    return results


@pytest.mark.parametrize("name", CASES)
def test_every_other_rank_names_the_one_to_blame_in_time(ended: tuple[dict[str, Ended], Path], name: str) -> None:
    case, result = CASES[name], ended[0][name]
    print(f"{name}: {result.after_s:.1f} s, exit codes {result.codes}")
    print("\n".join(f"--- {rank}\n{said}" for rank, said in enumerate(result.said)))
    late_s = MARGIN_S + PATIENCE_S if "pipeline" in case.parallel else 0
    assert result.after_s < TIMEOUT_S + late_s + FEW_S
    for rank, (code, said) in enumerate(zip(result.codes, result.said, strict=True)):
        assert code != 0
        if rank != case.victim or case.store:
            named = re.search(rf"^rank {rank}: rank {case.victim} \(host \S+, pid \d+\) {case.message}", said, re.M)
            assert named, said
            assert said.count(f"rank {rank}: ") == 1


def test_who_hangs_shows_where(ended: tuple[dict[str, Ended], Path]) -> None:
    for name in ("hangs", "hangs in a pipeline"):
        case, result = CASES[name], ended[0][name]
        assert result.codes[case.victim] == LOST
        assert "in stand_still" in result.said[case.victim]
        assert "in stand_still" not in result.said[0]


def test_slow_steps_end_nothing(ended: tuple[dict[str, Ended], Path]) -> None:
    """What hung in its fourth step had gone through a slow one, and through one above the timeout, of both ranks."""
    times = [line["time"] for line in metrics(ended[1] / "hangs" / "run")]
    assert len(times) == 3
    assert times[1] - times[0] > SLOW_S
    assert times[2] - times[1] > LONG_S > TIMEOUT_S
