"""The scripts of cluster/ as a user hands them to sbatch, on a real SLURM: they train, save when asked, go on, stop.

A run that was interrupted in whatever way is one lineage: its steps are 1, 2, 3, ..., it consumed each sample once and
in order, and its curve is that of one process that nobody has disturbed.
"""

from __future__ import annotations

import json
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import run_command
from slurm.cluster import Cluster
from tiny_runs import consumed, make_data

from parallel.launch.exit_codes import REFUSED, STOPPED
from spar_scale.runs.curves import curve, distance

ROOT = Path(__file__).resolve().parents[2]
RECIPE, SCRIPT = "recipes/smoke/bootstrap_autoencoder.yaml", "cluster/stage0_bootstrap.sh"
STEPS, BATCH, EARLY = 120, 6, 10
DRIFT = 1e-5
"""Of the loss over all steps against one process, beyond the floor of 1e-6: rounding."""
SMALL = [f"global_batch={BATCH}", f"data.task_block={BATCH}", "parallel.micro_batch=2", "train.log_every=1",
         "checkpoint.every=1000000", "optimizer.name=adamw", "optimizer.clip=1.0", "optimizer.lr=1e-5",
         "optimizer.schedule=constant"]  # fmt: skip
SITE = {"SPAR_HOME": str(ROOT), "SPAR_PYTHON": sys.executable, "SPAR_DEVICE": "cpu", "RECIPE": RECIPE}


class Jobs:
    """Submits training jobs of one small recipe, each into a run directory of its own, and waits for what they do."""

    def __init__(self, slurm: Cluster, folder: Path):
        self.slurm, self.folder = slurm, folder
        make_data(folder / "data", edits=16)
        self.values = [*SMALL, f"train.steps={STEPS}", f"data.sources.0.shards={folder}/data/scenes-*.tar"]

    def run_dir(self, name: str) -> Path:
        return self.folder / name

    def submit(self, name: str, *options: str, changes: tuple[str, ...] = (), env: dict[str, str] | None = None) -> str:
        """Submit the script as it is; its output goes to a file beside the run directory."""
        own = ["--output", f"{self.folder}/{name}.out", *options]
        found = SITE | {"RUN_DIR": str(self.run_dir(name))} | (env or {})
        return self.slurm.sbatch(*own, SCRIPT, *self.values, *changes, env=found, cwd=ROOT)

    def said(self, name: str) -> str:
        file = self.folder / f"{name}.out"
        return file.read_text(errors="replace") if file.exists() else ""

    def steps(self, name: str) -> int:
        log = self.run_dir(name) / "metrics.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    def until(self, name: str, text: str, timeout: float = 240) -> None:
        self.slurm.wait_until(lambda: text in self.said(name), timeout, f"{text!r} in\n{self.said(name)}")

    def until_step(self, name: str, step: int, timeout: float = 240) -> None:
        self.slurm.wait_until(lambda: self.steps(name) >= step, timeout, f"step {step}\n{self.said(name)}")

    def restarted(self, job: str, timeout: float = 300) -> None:
        self.slurm.wait_until(lambda: self.slurm.job(job)["Restarts"] != "0", timeout, f"a restart of job {job}")


@pytest.fixture(scope="module")
def jobs(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(slurm, tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def alone(jobs: Jobs) -> Path:
    """The run directory of the same recipe, trained by one process without any SLURM."""
    run_command(["train", RECIPE, *jobs.values, f"run_dir={jobs.run_dir('alone')}"], ROOT)
    return jobs.run_dir("alone")


def check_lineage(jobs: Jobs, name: str, alone: Path, steps: int = STEPS) -> None:
    found = curve(jobs.run_dir(name))
    assert len(found) >= steps
    assert consumed(jobs.run_dir(name)) == list(range(BATCH * len(found)))
    loss, _ = distance(found[:steps], curve(alone)[:steps])
    print(f"{name}: loss within {loss:.1e} of one process over {steps} steps")
    assert loss < DRIFT


@pytest.fixture(scope="module")
def timed(jobs: Jobs) -> Iterator[str]:
    """A job whose time limit comes while another test runs; SLURM warns it a minute before, or half."""
    job = jobs.submit("timed", "--nodes=1", "--nodelist=node4", "--time=3", "--signal=B:USR1@60",
                      changes=("train.steps=1000000",))  # fmt: skip
    yield job
    jobs.slurm.run("scancel", job)


def test_a_warning_saves_requeues_and_goes_on_as_the_same_run(jobs: Jobs, timed: str, alone: Path) -> None:
    gres = [f"--gres=gpu:{jobs.slurm.gpus}"] if jobs.slurm.gpus else []
    job = jobs.submit("warned", "--nodes=2", "--exclude=node4", *gres, changes=("tracking.mirror=true",))
    assert not gres or jobs.slurm.job(job)["TresPerNode"] == "gres:gpu:8"
    jobs.until_step("warned", EARLY)
    known = (jobs.run_dir("warned") / "tracking.json").read_text()
    jobs.slurm.run("scancel", "--batch", "--signal=USR1", job)
    jobs.restarted(job)
    assert jobs.slurm.wait(job, "COMPLETED")["Restarts"] == "1"
    attempts = json.loads((jobs.run_dir("warned") / "attempts.json").read_text())
    assert [attempt["exit_code"] for attempt in attempts] == [STOPPED, 0]
    assert EARLY <= attempts[0]["step"] < attempts[1]["step"] == STEPS
    assert f"resumes from step {attempts[0]['step']} when nodes are free" in jobs.said("warned")
    assert "gpu        its checks are skipped on request" in jobs.said("warned")
    assert (jobs.run_dir("warned") / "tracking.json").read_text() == known
    check_lineage(jobs, "warned", alone)


def test_a_time_limit_saves_requeues_and_goes_on(jobs: Jobs, timed: str, alone: Path) -> None:
    jobs.restarted(timed)
    jobs.until("timed", "resumes from")
    saved = json.loads((jobs.run_dir("timed") / "attempts.json").read_text())[0]
    assert saved["exit_code"] == STOPPED and saved["step"] > 0
    jobs.slurm.run("scontrol", "update", f"jobid={timed}", "timelimit=30")  # it runs on for the next test
    jobs.until_step("timed", saved["step"] + EARLY)
    check_lineage(jobs, "timed", alone, steps=min(STEPS, jobs.steps("timed")))


def test_the_second_job_in_a_run_directory_is_refused(jobs: Jobs, timed: str) -> None:
    second = jobs.submit("timed", "--nodes=1", "--exclude=node4", changes=("train.steps=1000000",))
    try:
        assert jobs.slurm.wait(second, "FAILED")["ExitCode"] == f"{REFUSED}:0"
    finally:
        jobs.slurm.run("scancel", second)  # one that is not refused would keep its node from the next tests
    assert "in use by process" in jobs.said("timed")
    before = jobs.steps("timed")
    jobs.until_step("timed", before + 1)  # the first has not noticed
    jobs.slurm.run("scancel", timed)
    jobs.slurm.wait(timed, "CANCELLED")


def test_a_lost_node_leaves_the_run_to_the_others(jobs: Jobs, alone: Path) -> None:
    size = ("--nodes=1-2", "--exclude=node[3-4]")
    job = jobs.submit("lost", *size, changes=("checkpoint.every=20",))
    jobs.until_step("lost", 2 * 20 + 1)
    assert jobs.slurm.job(job)["NumNodes"] == "2"
    jobs.slurm.kill_node("node2")
    jobs.slurm.mark_down("node2")
    try:
        jobs.restarted(job)
        assert jobs.slurm.wait(job, "COMPLETED")["NodeList"] == "node1"
        assert "attempt 2 on 1 node(s), from step" in jobs.said("lost")
    finally:
        jobs.slurm.boot("node2")
    check_lineage(jobs, "lost", alone)


def test_a_job_of_higher_rank_preempts_and_the_run_goes_on_after_it(jobs: Jobs, alone: Path) -> None:
    job = jobs.submit("preempted", "--partition=low", "--nodelist=node1")
    jobs.until_step("preempted", EARLY)
    high = jobs.slurm.sbatch("--nodelist=node1", "--exclusive", "--wrap", "sleep 3")
    jobs.restarted(job)
    jobs.slurm.wait(high, "COMPLETED")
    jobs.slurm.wait(job, "COMPLETED")
    assert "stops on SIGUSR1 after step" in jobs.said("preempted")
    check_lineage(jobs, "preempted", alone)


def test_a_refused_stage_cancels_what_waits_for_it(jobs: Jobs) -> None:
    broken = jobs.submit("broken", "--nodes=2", "--exclude=node4", changes=("optimizer.lr=-1",))
    behind = jobs.slurm.sbatch(f"--dependency=afterok:{broken}", "--kill-on-invalid-dep=yes", "--wrap", "true")
    record = jobs.slurm.wait(broken, "FAILED")
    assert (record["ExitCode"], record["Restarts"]) == (f"{REFUSED}:0", "0")
    assert "optimizer.lr: found" in jobs.said("broken")
    jobs.slurm.wait(behind, "CANCELLED")


def test_without_gpus_a_job_says_what_to_ask_for(jobs: Jobs) -> None:
    job = jobs.submit("bare", "--nodes=1", "--exclude=node4", env={"SPAR_DEVICE": "cuda"})
    assert jobs.slurm.wait(job, "FAILED")["ExitCode"] == f"{REFUSED}:0"
    assert "SLURM gave this job no GPU; request GPUs (sbatch --gres=gpu:8)" in jobs.said("bare")


def broken(folder: Path, condition: str) -> dict[str, str]:
    """An environment in which a Python dies at its start under a condition on its node and its command line."""
    folder.mkdir()
    text = f"""
        import os, sys
        node, words = os.environ.get("SLURMD_NODENAME"), " ".join(sys.orig_argv)
        if {condition}:
            os.kill(os.getpid(), 9)
    """
    (folder / "sitecustomize.py").write_text(textwrap.dedent(text))
    return {"PYTHONPATH": str(folder)}


def test_a_bad_node_is_named_and_the_job_goes_on_without_it(jobs: Jobs) -> None:
    site = broken(jobs.folder / "site2", 'node == "node2" and "cluster node doctor" in words')
    size = ("--nodes=1-2", "--exclude=node[3-4]", "--comment=mine")
    job = jobs.submit("unfit", *size, changes=("train.steps=3",), env=site)
    jobs.restarted(job)  # the others wait a minute for it
    record = jobs.slurm.wait(job, "COMPLETED")
    assert (record["NodeList"], record["ExcNodeList"]) == ("node1", "node[3-4],node2")
    assert record["Comment"] == "not fit: node2"
    assert "node2 is not fit: no findings: it died or hangs" in jobs.said("unfit")


def test_a_run_that_gets_nowhere_stops(jobs: Jobs) -> None:
    site = broken(jobs.folder / "site", '"spar_scale.cli train" in words')
    run_dir = jobs.run_dir("stuck")
    run_dir.mkdir()
    earlier = [{"job": "1", "restart": number, "step": 0, "exit_code": 137} for number in range(2)]
    (run_dir / "attempts.json").write_text(json.dumps(earlier))
    job = jobs.submit("stuck", "--nodes=1", "--exclude=node4", env=site)
    assert jobs.slurm.wait(job, "FAILED")["Restarts"] == "0"
    assert "3 attempts made no new checkpoint (exit code 137)" in jobs.said("stuck")


def test_the_whole_chain_from_one_command_to_the_report(slurm: Cluster, jobs: Jobs) -> None:
    """That of the miniature, and the recipes of SPAR-3B as they are rehearsed before they cost a GPU."""
    began, root, rehearsal = time.monotonic(), jobs.folder / "chain", jobs.folder / "rehearsal"
    words = ["rehearse", "recipes/spar_3b", "--preset", "nano", "--out", str(rehearsal), "--no-train"]
    run_command(words, ROOT)
    numbers = submitted(slurm, ["recipes/tiny", str(root)], SITE | {"SIZE": "smoke", "RECIPE": ""})
    rehearsed = submitted(slurm, [str(rehearsal / "recipes"), str(rehearsal)], SITE | {"RECIPE": ""})
    assert next(iter(numbers)) == "world" and list(numbers)[-1] == "evaluate"
    assert list(rehearsed)[-1] == "instruct"
    slurm.wait(rehearsed["instruct"], "COMPLETED", timeout=1600)
    slurm.wait(numbers["evaluate"], "COMPLETED", timeout=1600)
    print(f"the chains took {time.monotonic() - began:.0f} s")
    assert "<html" in (root / "report.html").read_text()[:200] and (root / "scores.json").exists()
    assert all((root / name / "metrics.jsonl").exists() for name in list(numbers)[1:-1])
    assert all((rehearsal / name / "checkpoints" / "latest").exists() for name in rehearsed)


def submitted(slurm: Cluster, words: list[str], environment: dict[str, str]) -> dict[str, str]:
    """Submit a chain; return the name of each job -> its number."""
    told = slurm.run("cluster/submit_all.sh", *words, "--exclude=node4", cwd=ROOT, env=environment)
    lines = (line.split() for line in told.splitlines())
    return {words[1]: words[0] for words in lines if words[0].isdigit()}
