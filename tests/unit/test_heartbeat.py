"""Who is to blame, from what the ranks last said: the silent, the late, the failed, in this order."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any, cast

import pytest
from launching import start_process

from parallel.launch.exit_codes import LOST
from parallel.launch.heartbeat import PATIENCE_S, WAITING, Beat, Heartbeat, Seen, judge

TIMEOUT_S = 30.0
NOW_S = 100.0


def seen(
    begun: dict[str, int] | None = None,
    silent_s: float = 0,
    stood_s: float = 0,
    left: str | None = None,
    follows: bool = False,
) -> Seen:
    beat = Beat("step 17", begun or {"dp": 4}, left, follows)
    return Seen(beat, NOW_S - silent_s, NOW_S - max(silent_s, stood_s))


def waiting(**begun: int) -> Seen:
    return seen(begun, stood_s=TIMEOUT_S + 1)


SILENT, STANDS = "sent its last heartbeat 31 s ago at step 17", "is alive but has been at step 17 for 31 s"
CASES = {
    "all well": ([seen(), seen()], {}),
    "silent below the timeout": ([seen(), seen(silent_s=29)], {}),
    "silent": ([seen(), seen(silent_s=31)], {1: SILENT}),
    "silent, and others wait for it": ([waiting(dp=5), seen({"dp": 4}, silent_s=31)], {1: SILENT}),
    "late": ([waiting(dp=5), waiting(dp=4), waiting(dp=5)], {1: STANDS}),
    "late, but only for a while": ([seen({"dp": 5}, stood_s=29), seen({"dp": 4}, stood_s=29)], {}),
    "a long step of all": ([waiting(dp=4), waiting(dp=4)], {}),
    "late for one that is late": (
        # 2 stands; 3, in one group with it, waits; 1, in one group with 3, waits for 3
        [waiting(a=1, c=2), waiting(a=1, d=3), waiting(b=1, c=1), waiting(b=2, d=2)],
        {2: STANDS},
    ),
    "finished": ([waiting(dp=5), seen({"dp": 4}, silent_s=31, left="")], {}),
    "failed just now": ([seen(), seen(left="ValueError: no")], {}),
    "failed": (
        [seen(), seen(stood_s=PATIENCE_S + 1, left="ValueError: no")],
        {1: "failed at step 17: ValueError: no"},
    ),
    "failed because another did": (
        [seen(stood_s=6, left="RuntimeError: gloo", follows=True), seen(stood_s=6, left="ValueError: no")],
        {1: "failed at step 17: ValueError: no"},
    ),
    "failed because another died": (
        [seen(stood_s=1, left="RuntimeError: gloo", follows=True), seen(silent_s=6)],
        {1: "sent its last heartbeat 6 s ago at step 17"},
    ),
    "failed because another hangs": (
        [seen(stood_s=6, left="RuntimeError: gloo", follows=True), seen(stood_s=31)],
        {1: STANDS},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_one_to_blame_is_named(case: str) -> None:
    ranks, expected = CASES[case]
    assert judge(dict(enumerate(ranks)), NOW_S, TIMEOUT_S, knows_all=True) == expected


def test_who_knows_not_all_blames_nobody_for_being_late() -> None:
    for case in ("late", "failed because another hangs"):
        assert judge(dict(enumerate(CASES[case][0])), NOW_S, TIMEOUT_S, knows_all=False) == {}


def hang_in_a_read(place: str) -> None:
    """Read from an empty pipe, which nobody writes to, as from a network disk that has gone."""
    alone: Any = SimpleNamespace(world=1, rank=0)
    with Heartbeat(cast(Any, alone), timeout_s=1.0) as heartbeat:
        heartbeat.place = place
        os.read(os.pipe()[0], 1)


def test_a_read_of_data_that_hangs_ends_a_process_alone_in_its_world() -> None:
    process = start_process(hang_in_a_read, f"step 3, {WAITING}")
    process.join(60)
    assert process.exitcode == LOST
