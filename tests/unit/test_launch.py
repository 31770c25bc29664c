"""Rank, world and meeting place from the environments that launchers make; one without a launcher is alone."""

from __future__ import annotations

import logging
import socket

import pytest
import torch.distributed as dist

from parallel.errors import UserError
from parallel.launch.environment import PORTS, read_environment, rendezvous
from parallel.launch.world import start, stop

BATCH = {  # a batch script of `sbatch --nodes=2 --ntasks=8`, itself
    "SLURM_JOB_ID": "71002", "SLURM_JOB_NODELIST": "node[003-004]", "SLURM_JOB_NUM_NODES": "2", "SLURM_NNODES": "2",
    "SLURM_NTASKS": "8", "SLURM_NPROCS": "8", "SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_NODEID": "0", "SLURM_GTIDS": "0",
    "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_TASK_PID": "1381", "SLURMD_NODENAME": "node003",
}  # fmt: skip
STEP = {
    "SLURM_STEP_ID": "0", "SLURM_STEPID": "0", "SLURM_STEP_NODELIST": "node[003-004]", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_LAUNCH_NODE_IPADDR": "10.0.205.134",
    "SLURM_SRUN_COMM_HOST": "10.0.205.134", "SLURM_SRUN_COMM_PORT": "43247",
}  # fmt: skip
LAST_OF_8 = BATCH | STEP | {"SLURM_PROCID": "7", "SLURM_LOCALID": "3", "SLURM_NODEID": "1"}
ONE_NODE = LAST_OF_8 | {
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "2",
    "SLURM_STEP_NODELIST": "node009",
}
ONE_EACH = LAST_OF_8 | {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_TASKS_PER_NODE": "1(x2)"}
SALLOC = {name: BATCH[name] for name in BATCH if name not in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_GTIDS")}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "node003", "MASTER_PORT": "29500"}

ENVIRONMENTS = {
    "nothing": ({}, (0, 1, 0)),
    "torchrun": (TORCHRUN, (5, 16, 1)),
    "one node, many tasks": (ONE_NODE, (2, 4, 2)),
    "many nodes": (LAST_OF_8, (7, 8, 3)),
    "one task per node": (ONE_EACH, (1, 2, 0)),
    "torchrun started by srun": (ONE_EACH | TORCHRUN, (5, 16, 1)),
    "the shell of salloc": (SALLOC, (0, 1, 0)),
    "the shell of salloc as a step of its own": (SALLOC | STEP | {"SLURM_STEP_ID": "4294967290"}, (0, 1, 0)),
    "the same, called task 0": (BATCH | STEP | {"SLURM_STEP_ID": "4294967290"}, (0, 1, 0)),
    "a batch script": (BATCH, (0, 1, 0)),
    "a batch script with its step's number": (BATCH | {"SLURM_STEP_ID": "4294967291"}, (0, 1, 0)),
    "the same as some versions write it": (BATCH | {"SLURM_STEP_ID": "-5"}, (0, 1, 0)),
    "torchrun in a batch script": (BATCH | TORCHRUN, (5, 16, 1)),
    "torchrun, one process": (TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, (0, 1, 0)),
    "one process without a place to meet": ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, (0, 1, 0)),
    "an address left in the shell": ({"MASTER_ADDR": "node003"}, (0, 1, 0)),
    "a port left in the shell": ({"MASTER_PORT": "x"}, (0, 1, 0)),
    "a world left in the shell": ({"WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "node003"}, (0, 1, 0)),
    "an address left in a batch script": (BATCH | {"MASTER_ADDR": "node003", "MASTER_PORT": "29500"}, (0, 1, 0)),
    "srun, with an address and a port": (ONE_NODE | {"MASTER_ADDR": "a", "MASTER_PORT": "29500"}, (2, 4, 2)),
    "srun --pty": (BATCH | STEP | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, (0, 1, 0)),
    "one task of a shell in srun": (BATCH | STEP | {"SLURM_NTASKS": "1"}, (0, 1, 0)),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_rank_world_and_local_rank(name: str) -> None:
    environment, expected = ENVIRONMENTS[name]
    assert read_environment(environment) == expected


TOGETHER = "; start all processes with torchrun, or unset RANK$"
RANGE = r"RANK/WORLD_SIZE/LOCAL_RANK: found RANK={} WORLD_SIZE={} LOCAL_RANK={}, must be 0 <= LOCAL_RANK <= RANK"
REFUSED = {
    "RANK alone": ({"RANK": "1"}, rf"^the environment sets RANK=1 but not WORLD_SIZE, LOCAL_RANK{TOGETHER}"),
    "no local rank": (
        {"RANK": "1", "WORLD_SIZE": "2"},
        "^the environment sets RANK=1 WORLD_SIZE=2 but not LOCAL_RANK",
    ),
    "half of srun": (
        STEP | {"SLURM_PROCID": "0"},
        "^the environment sets SLURM_PROCID=0 but not SLURM_NTASKS, SLURM_LOCALID; start all processes with srun$",
    ),
    "no number": (TORCHRUN | {"RANK": "first"}, rf"^RANK/.*: found RANK=first WORLD.* must be whole numbers{TOGETHER}"),
    "empty": (TORCHRUN | {"LOCAL_RANK": ""}, "^RANK/WORLD_SIZE/LOCAL_RANK: found .*, must be whole numbers"),
    "rank above the world": (TORCHRUN | {"RANK": "16"}, RANGE.format(16, 16, 1)),
    "negative rank": (TORCHRUN | {"RANK": "-1"}, RANGE.format(-1, 16, 1)),
    "world of none": (TORCHRUN | {"RANK": "0", "WORLD_SIZE": "0"}, RANGE.format(0, 0, 1)),
    "negative world": (TORCHRUN | {"WORLD_SIZE": "-2"}, RANGE.format(5, -2, 1)),
    "local rank above the rank": (TORCHRUN | {"LOCAL_RANK": "6"}, RANGE.format(5, 16, 6)),
    "negative local rank": (TORCHRUN | {"LOCAL_RANK": "-1"}, RANGE.format(5, 16, -1)),
    "task above the step": (LAST_OF_8 | {"SLURM_PROCID": "8"}, "0 <= SLURM_LOCALID <= SLURM_PROCID < SLURM_NTASKS"),
    "no address": (
        {name: TORCHRUN[name] for name in TORCHRUN if name != "MASTER_ADDR"},
        "^the environment sets WORLD_SIZE=16 but not MASTER_ADDR, where the processes meet",
    ),
    "empty address": (TORCHRUN | {"MASTER_ADDR": ""}, "^MASTER_ADDR: found an empty text"),
    "port of no number": (
        TORCHRUN | {"MASTER_PORT": "http"},
        "^MASTER_PORT: found 'http', must be the number",
    ),
    "port 0": (TORCHRUN | {"MASTER_PORT": "0"}, "^MASTER_PORT: found '0'"),
    "port out of range under srun": (ONE_NODE | {"MASTER_PORT": "65536"}, "^MASTER_PORT: found '65536'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_environment_that_makes_no_world_is_refused_in_one_line(name: str) -> None:
    environment, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as caught:
        read_environment(environment)
    assert "\n" not in str(caught.value)
    assert ("SLURM" in str(caught.value)) == (name in ("half of srun", "task above the step"))


HOSTS = {
    "node003": "node003",
    "node[003-004]": "node003",
    "node[003,005-006],node9": "node003",
    "a1,b[2-3]": "a1",
    "[1-2]": "1",
    "n[1]": "n1",
    "n[10,2]": "n10",
    "n[001-100],m": "n001",
    "a-b_c.d": "a-b_c.d",
    "10.0.0.1,10.0.0.2": "10.0.0.1",
    "x[1-2][3-4]y[5]": "x13y5",
    "a": "a",
    "login1,n[1-2]": "login1",
    "rack[1-2]n[01-04]": "rack1n01",
    "sh04-16n09.example.org,x": "sh04-16n09.example.org",
}


@pytest.mark.parametrize("hosts", HOSTS)
def test_tasks_meet_at_the_first_host_of_their_step(hosts: str) -> None:
    assert rendezvous(LAST_OF_8 | {"SLURM_STEP_NODELIST": hosts})[0] == HOSTS[hosts]


def test_the_port_is_that_of_the_job_and_the_step() -> None:
    jobs = [{"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)} for job in range(71000, 71900) for step in range(10)]
    ports = [rendezvous(LAST_OF_8 | job)[1] for job in jobs]
    assert len(set(ports)) == len(jobs)
    assert set(ports) <= set(PORTS)
    assert rendezvous(LAST_OF_8 | jobs[0]) == rendezvous(ONE_EACH | jobs[0])


@pytest.mark.parametrize("broken", [{"SLURM_STEP_NODELIST": "node[003"}, {"SLURM_JOB_ID": ""}, {"SLURM_STEP_ID": "x"}])
def test_a_meeting_place_that_cannot_be_read_is_refused(broken: dict[str, str]) -> None:
    with pytest.raises(
        UserError, match=r"^SLURM_STEP_NODELIST/SLURM_JOB_ID/SLURM_STEP_ID: .*or MASTER_ADDR and MASTER"
    ):
        rendezvous(LAST_OF_8 | broken)


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch):
    """Put an environment in place of this process's own; what `start` adds to it goes with the test."""

    def put(environment: dict[str, str]) -> None:
        for name in (*TORCHRUN, *BATCH, *STEP):
            monkeypatch.setenv(name, "")  # so that monkeypatch restores it
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    yield put
    stop()


def test_a_batch_script_trains_alone_and_says_so(slurm, caplog: pytest.LogCaptureFixture) -> None:
    slurm(BATCH)
    with caplog.at_level(logging.WARNING):
        assert start().world == 1
    assert "SLURM gave this job 8 tasks, but this process is not one of them" in caplog.text


def test_an_allocation_of_one_task_says_nothing(slurm, caplog: pytest.LogCaptureFixture) -> None:
    slurm(BATCH | {"SLURM_NTASKS": "1"})
    with caplog.at_level(logging.WARNING):
        assert start().world == 1
    assert "SLURM" not in caplog.text


@pytest.mark.parametrize("left", [{"MASTER_ADDR": "203.0.113.1"}, {"MASTER_PORT": "x"}, {"WORLD_SIZE": "8"}], ids=str)
def test_a_process_without_a_launcher_trains_alone_whatever_is_left_in_its_shell(slurm, left: dict[str, str]) -> None:
    slurm(left)
    assert start(timeout_s=5).world == 1


def test_tasks_of_srun_meet_without_a_launcher(slurm) -> None:
    """The first of two: it finds its place, where the other does not come."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        first = {"SLURM_STEP_NODELIST": "localhost,x", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
        slurm(ONE_NODE | first | {"MASTER_PORT": str(port)})
        with pytest.raises(UserError, match=rf"^MASTER_ADDR=localhost MASTER_PORT={port}: 4 processes could not meet"):
            start(timeout_s=1)
    assert not dist.is_initialized()
