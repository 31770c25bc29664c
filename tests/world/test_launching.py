"""The launcher of test worlds: results by rank, failures with their rank, nothing left running."""

from __future__ import annotations

import gc
import os
import signal
import sys

import pytest
import torch
import torch.distributed as dist
from launching import WorldError, run_world

from parallel.errors import UserError


class Token:
    """A class of the test module itself: arguments of it must be found again in the worker."""

    def __init__(self, value: int) -> None:
        self.value = value


def _sum_of_ranks(rank: int, size: int, token: Token) -> tuple[int, int]:
    total = torch.tensor(rank)
    dist.all_reduce(total)
    return rank, int(total) * token.value


def _refuse(rank: int, size: int) -> None:
    if rank == 1:
        raise UserError("recipe.seed: nothing")
    dist.barrier()


def _die(rank: int, size: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _hang(rank: int, size: int) -> None:
    if rank == 0:
        signal.pause()


def _not_collected(rank: int, size: int) -> int:
    return gc.get_freeze_count()


def _own_group(rank: int, size: int) -> str:
    assert not dist.is_initialized()
    dist.init_process_group("gloo")
    names: list[str] = [""] * size
    dist.all_gather_object(names, os.environ["GREETING"] + str(rank))
    dist.destroy_process_group()
    return "".join(names)


def test_results_come_back_in_rank_order() -> None:
    assert run_world(3, _sum_of_ranks, Token(10)) == [(0, 30), (1, 30), (2, 30)]


def test_the_environment_alone_is_enough_to_join() -> None:
    assert run_world(2, _own_group, initialise=False, env={"GREETING": "r"}) == ["r0r1", "r0r1"]


def test_collections_in_a_rank_leave_out_what_the_fork_server_has_imported() -> None:
    assert run_world(1, _not_collected, initialise=False)[0] > len(sys.modules)


def test_an_exception_names_its_rank_and_keeps_its_type() -> None:
    with pytest.raises(WorldError, match=r"rank 1: (.|\n)*recipe.seed: nothing") as caught:
        run_world(2, _refuse)
    assert isinstance(caught.value.cause, UserError)


def test_a_killed_rank_ends_the_world() -> None:
    with pytest.raises(WorldError) as caught:
        run_world(2, _die)
    assert caught.value.exit_codes[1] == -signal.SIGKILL


def test_a_hanging_rank_is_named_when_time_is_up() -> None:
    with pytest.raises(WorldError, match="rank 0: no result within 2 s"):
        run_world(2, _hang, timeout_s=2.0)
