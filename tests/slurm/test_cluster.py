"""The SLURM that the tests of this folder stand on behaves as a cluster does, loses nodes and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

import pytest
from slurm.cluster import Cluster


def test_a_step_runs_once_on_each_of_two_nodes(slurm: Cluster) -> None:
    nodes = slurm.run("srun", "--nodes=2", "printenv", "SLURMD_NODENAME").splitlines()
    assert len(set(nodes)) == 2 and set(nodes) <= set(slurm.nodes)


def test_jobs_resolve_the_names_of_all_nodes(slurm: Cluster) -> None:
    if not slurm.namespace:
        pytest.skip("no mount namespace of our own is permitted here")
    addresses = slurm.run("srun", "getent", "hosts", *slurm.nodes).splitlines()
    assert [line.split()[0] for line in addresses] == ["127.0.0.1"] * 4
    assert all(name not in Path("/etc/hosts").read_text() for name in slurm.nodes)


def test_a_job_gets_all_gpus_of_its_node(slurm: Cluster) -> None:
    if not slurm.gpus:
        pytest.skip("no device files may be made here, which stand for GPUs")
    assert slurm.run("srun", "--gres=gpu:8", "printenv", "CUDA_VISIBLE_DEVICES") == "0,1,2,3,4,5,6,7"


def test_fields_of_a_job_hold_what_was_given(slurm: Cluster) -> None:
    text = "step=3 State=of things  JobState=x"
    job = slurm.sbatch("--hold", "--comment", text, "--job-name", text, "--exclude=node[2-3]", "--wrap", "true")
    record = slurm.job(job)
    slurm.run("scancel", job)
    assert (record["JobId"], record["JobName"], record["Comment"]) == (job, text, text)
    assert (record["JobState"], record["Reason"]) == ("PENDING", "JobHeldUser")
    assert (record["Restarts"], record["ExcNodeList"], record["NumNodes"]) == ("0", "node[2-3]", "1")


def test_a_chain_goes_on_after_success_and_ends_after_failure(slurm: Cluster) -> None:
    good = slurm.sbatch("--wrap", "exit 0")
    bad = slurm.sbatch(f"--dependency=afterok:{good}", "--wrap", "exit 3")
    child = slurm.sbatch(f"--dependency=afterok:{bad}", "--kill-on-invalid-dep=yes", "--wrap", "true")
    assert f"afterok:{bad}" in slurm.job(child)["Dependency"]
    assert slurm.wait(child)["JobState"] == "CANCELLED"
    assert slurm.wait(bad)["ExitCode"] == "3:0"
    assert slurm.wait(good)["JobState"] == "COMPLETED"


def test_waiting_for_a_job_that_has_failed_shows_its_output_at_once(slurm: Cluster) -> None:
    job = slurm.sbatch("--wrap", "echo no such checkpoint; exit 1")
    with pytest.raises(AssertionError, match=r"is FAILED, not COMPLETED(.|\n)*no such checkpoint"):
        slurm.wait(job, "COMPLETED")


@pytest.mark.slow
def test_a_job_that_loses_one_of_three_nodes_starts_again_on_two(slurm: Cluster) -> None:
    log, task = f"{slurm.directory}/log/node3.log", (str(slurm.directory), "SLURMD_NODENAME=node3")
    size = ("--nodes=2-3", "--exclusive", "--exclude=node4", "--requeue")
    job = slurm.sbatch(*size, "--wrap", "srun --kill-on-bad-exit sh -c 'sleep 300 & wait'")
    assert slurm.wait(job, "RUNNING")["NumNodes"] == "3"
    slurm.wait_until(lambda: _processes_that_know(*task), 30, "the step runs")
    slurm.kill_node("node3")
    slurm.mark_down("node3")
    assert not _processes_that_know(log) and not _processes_that_know(*task)
    slurm.wait_until(lambda: slurm.job(job)["Restarts"] == "1", 60, "requeued")
    record = slurm.wait(job, "RUNNING", timeout=60)
    assert (record["NodeList"], record["NumNodes"]) == ("node[1-2]", "2")
    slurm.run("scancel", job)
    slurm.boot("node3")
    slurm.idle()
    assert len(slurm.run("srun", "--nodes=4", "printenv", "SLURMD_NODENAME").splitlines()) == 4


def test_nothing_is_left_of_a_cluster_and_its_neighbour_lives(slurm: Cluster) -> None:
    with Cluster(nodes=1) as other:
        folder = str(other.directory)
        job = other.sbatch("--wrap", "setsid env -i sleep 300 & sleep 300")  # one task that hides
        other.wait(job, "RUNNING")
        client = subprocess.Popen(["srun", "--exclusive", "true"], env=other.environment, stderr=subprocess.DEVNULL)
        other.wait_until(lambda: str(_processes_that_know(folder)).count("sleep") == 2, 30, "both tasks run")
    assert client.wait(timeout=10) != 0
    assert not _processes_that_know(folder) and not os.path.exists(folder)
    assert slurm.run("srun", "echo", "still here") == "still here"


def _processes_that_know(*texts: str) -> list[str]:
    """Name the programs that run with all of `texts` in their arguments, environment or names of open files."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            known = [(process / file).read_text(errors="replace") for file in ("cmdline", "environ")]
            known += [os.readlink(file) for file in (process / "fd").iterdir()]
            if all(any(text in place for place in known) for text in texts):
                found.append(known[0])
    return found
