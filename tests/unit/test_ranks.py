"""A step of two ranks: they meet, one of them speaks, either's failure ends both, and both are paid for."""

from __future__ import annotations

import importlib
import os
import re
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parallel.errors import UserError
from parallel.launch.heartbeat import Heartbeat
from parallel.launch.world import start
from parallel.topology import Layout, Topology
from spar_scale.runs import ranks
from spar_scale.runs.processes import Step, run_steps
from spar_scale.runs.spending import read_spending


def rank() -> int:
    return int(os.environ["RANK"])


def meet() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))


def run(folder: Path, work: Callable[[], object], *others: Step) -> None:
    run_steps([*others, Step("a", folder / "a", partial(ranks.run_ranks, work, 2))], jobs=2)


def test_the_ranks_meet_on_the_loopback_and_the_first_alone_speaks(tmp_path: Path, capfd):
    def work() -> None:
        meet()
        total = torch.tensor(rank() + 1)
        dist.all_reduce(total)
        print(f"rank {rank()} of {dist.get_world_size()} on {os.environ['MASTER_ADDR']}: {total}")

    run(tmp_path, work)
    lines = [line for line in capfd.readouterr().err.splitlines() if "rank" in line]
    assert lines == ["a: rank 0 of 2 on 127.0.0.1: 3"]


def test_core_seconds_are_those_of_all_ranks(tmp_path: Path):
    def burn() -> None:
        until = time.process_time() + 0.3
        while time.process_time() < until:
            pass

    run(tmp_path, burn)
    assert 0.6 <= read_spending(tmp_path / "a").core_seconds < 1.2


def test_a_refusal_of_any_rank_ends_the_step_with_its_message(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(ranks, "GRACE_S", 0.3)  # who waits for a meeting does not hear that it is off

    def work() -> None:
        if rank() == 1:
            raise UserError("train.steps: found 0")
        meet()  # nobody comes

    with pytest.raises(UserError, match=r"^a: train\.steps: found 0$"):
        run(tmp_path, work)
    assert not read_spending(tmp_path / "a").finished


def test_a_defect_of_any_rank_is_shown_and_not_what_followed_from_it(tmp_path: Path, capfd):
    def work() -> None:
        meet()
        print(1 // (1 - rank()))
        dist.barrier()

    with pytest.raises(SystemExit, match="error: a failed; its output is above"):
        run(tmp_path, work)
    said = capfd.readouterr().err
    assert "a: ZeroDivisionError" in said and "RuntimeError" not in said and "SystemExit" not in said


def test_a_rank_that_leaves_without_a_word_is_named(tmp_path: Path, capfd):
    with pytest.raises(SystemExit, match="error: a failed"):
        run(tmp_path, lambda: os._exit(3 * rank()))
    assert "a: rank 1 ended with exit code 3" in capfd.readouterr().err


def test_a_killed_rank_is_told_with_its_signal(tmp_path: Path):
    def work() -> None:
        meet()
        if rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()

    with pytest.raises(UserError, match=r"^a: its process was ended by SIGKILL; .*--jobs 1"):
        run(tmp_path, work)


def test_a_rank_that_hangs_is_named_by_the_first(tmp_path: Path, capfd):
    importlib.import_module("deepspeed")  # once, before the forks

    def work() -> None:
        start()
        topology = Topology(Layout())
        with Heartbeat(topology, timeout_s=3):
            if rank() == 1:
                signal.pause()
            topology.gather(0)

    with pytest.raises(SystemExit, match="error: a failed"):
        run(tmp_path, work)
    assert re.search(r"a: rank 0: rank 1 \(host .*\) is alive but has been at its start", capfd.readouterr().err)


def test_all_ranks_end_with_their_step(tmp_path: Path):
    for name in "01":
        os.mkfifo(tmp_path / f"started-{name}")  # opening either end waits for the other

    def work() -> None:
        (tmp_path / str(rank())).write_text(str(os.getpid()))
        open(tmp_path / f"started-{rank()}", "wb").close()
        signal.pause()

    def refuse() -> None:
        for name in "01":
            open(tmp_path / f"started-{name}", "rb").close()
        raise UserError("no")

    with pytest.raises(UserError, match=r"^b: no$"):
        run(tmp_path, work, Step("b", tmp_path / "b", refuse))
    for name in "01":
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / name).read_text()), 0)
