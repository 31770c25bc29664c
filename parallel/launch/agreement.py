"""Run functions that may fail on some ranks so that all ranks get the same error and none hangs.

All functions also work without torch.distributed (`group` None and nothing initialised: world size 1). Without failures
they cost one all-reduce of a number; texts are exchanged only after a failure.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from parallel.errors import UserError

T = TypeVar("T")
POLL_S = 1.0
"""Seconds between two agreements that a long function still runs."""


def rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Return the rank and the number of ranks in the group; (0, 1) without torch.distributed."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def run_on_all_ranks(group: dist.ProcessGroup | None, function: Callable[[], T]) -> T:
    """Run `function` on every rank; if it fails on any rank, raise the same UserError on all.

    The message has the UserErrors and OSErrors of all failed ranks, each cause once. Any other exception is a defect:
    the failing rank raises it unchanged, the other ranks raise RuntimeError.
    """
    result, failure = None, None
    try:
        result = function()
    except Exception as error:
        failure = error
    problems = gather_if_any(group, None if failure is None else (isinstance(failure, UserError | OSError), failure))
    if not problems:
        return result  # type: ignore[return-value]
    texts = list(dict.fromkeys(str(error) for meant, error in problems.values() if meant))
    if len(texts) == len(dict.fromkeys(str(error) for _, error in problems.values())):
        more = f" (and {len(texts) - 3} more)" if len(texts) > 3 else ""
        raise UserError("; ".join(texts[:3]) + more, everywhere=True) from failure
    if failure is not None:
        raise failure
    raise RuntimeError("; ".join(f"rank {rank}: {error!r}" for rank, (_, error) in problems.items()))


def run_on_first_rank(group: dist.ProcessGroup | None, function: Callable[[], T]) -> T:
    """Run `function` on the group's first rank and return its (picklable) result on all ranks.

    Failures are raised as by `run_on_all_ranks`.
    """
    rank, size = rank_and_size(group)
    result = run_on_all_ranks(group, function if rank == 0 else lambda: None)
    if size == 1:
        return result  # type: ignore[return-value]
    box = [result]
    dist.broadcast_object_list(box, src=dist.get_global_rank(_or_default_group(group), 0), group=group)
    return box[0]  # type: ignore[return-value]


def run_long_on_first_rank(
    group: dist.ProcessGroup | None, function: Callable[[], None], report: Callable[[str], None]
) -> None:
    """Run `function` in a thread of the group's first rank; no rank waits for another longer than POLL_S at a time.

    Every rank's `report` gets the progress after each wait. Failures are raised as by `run_on_all_ranks`.
    """
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(function) if rank_and_size(group)[0] == 0 else None
        for waits in itertools.count():
            report(f"for {waits * POLL_S:g} s")
            if run_on_first_rank(group, lambda: _has_ended(running)):
                return


def _has_ended(running: Future[None] | None) -> bool:
    assert running is not None
    if running not in wait([running], timeout=POLL_S).done:
        return False
    running.result()
    return True


def gather_if_any(group: dist.ProcessGroup | None, value: Any) -> dict[int, Any]:
    """Return {rank: value} for the ranks whose (picklable) value is not None, on every rank."""
    rank, size = rank_and_size(group)
    if size == 1:
        return {} if value is None else {rank: value}
    count = torch.tensor(int(value is not None))
    dist.all_reduce(count, group=group)
    if not count:
        return {}
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value, group=group)
    return {rank: value for rank, value in enumerate(values) if value is not None}


def _or_default_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    actual = dist.group.WORLD if group is None else group
    assert actual is not None
    return actual
