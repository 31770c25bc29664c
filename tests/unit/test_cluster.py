"""What the scripts of cluster/ hand to Python, without a SLURM: environments, exit codes, lines, attempts, findings."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from tiny_runs import make_data, phase_values

from parallel.errors import UserError
from parallel.launch.exit_codes import DEFECT, LOST, REFUSED, STOPPED
from spar_scale.cluster.job import MAX_FRUITLESS, Attempts
from spar_scale.cluster.node import joint_code, rank_environments
from spar_scale.cluster.slurm import Job
from spar_scale.cluster.submit import submissions, submit
from spar_scale.config.recipe import Recipe
from spar_scale.doctor.preflight import FOLDER, bad_nodes, forget, preflight

ROOT = Path(__file__).resolve().parents[2]
STEP = {
    "SLURM_JOB_ID": "71", "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "node[003-004]", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NODEID": "1", "SLURM_PROCID": "1",
}  # fmt: skip


# -- the launcher of a node -------------------------------------------------------------------------


def test_every_gpu_of_a_node_is_a_rank() -> None:
    ranks = rank_environments(STEP | {"CUDA_VISIBLE_DEVICES": "0,1,2"})
    assert [rank["RANK"] for rank in ranks] == ["3", "4", "5"]
    assert [rank["LOCAL_RANK"] for rank in ranks] == ["0", "1", "2"]
    assert {rank["WORLD_SIZE"] for rank in ranks} == {"6"} and {rank["MASTER_ADDR"] for rank in ranks} == {"node003"}
    assert len({rank["MASTER_PORT"] for rank in ranks}) == 1 and "CUDA_VISIBLE_DEVICES" not in ranks[0]


def test_on_cpus_gpus_are_hidden_and_the_number_is_asked_for() -> None:
    asked = {"SPAR_DEVICE": "cpu", "SPAR_PROCESSES": "2", "CUDA_VISIBLE_DEVICES": "0", "MASTER_PORT": "29500"}
    ranks = rank_environments(STEP | asked)
    assert [rank["RANK"] for rank in ranks] == ["2", "3"]
    assert {(rank["CUDA_VISIBLE_DEVICES"], rank["MASTER_PORT"]) for rank in ranks} == {("", "29500")}


REFUSED_NODES = {
    "no GPU": ({}, "gave this job no GPU"),
    "device": ({"SPAR_DEVICE": "gpu"}, "SPAR_DEVICE: found 'gpu', must be cuda or cpu"),
    "processes": ({"SPAR_DEVICE": "cpu", "SPAR_PROCESSES": "0"}, "SPAR_PROCESSES: found '0'"),
    "no step": ({"SLURM_NODEID": ""}, "start this with srun, once per node"),
}


@pytest.mark.parametrize("case", REFUSED_NODES)
def test_a_node_that_cannot_start_says_what_to_set(case: str) -> None:
    changes, message = REFUSED_NODES[case]
    with pytest.raises(UserError, match=message):
        rank_environments(STEP | changes)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 0], 0),
        ([0, STOPPED], STOPPED),
        ([STOPPED, LOST], LOST),
        ([LOST, 1], LOST),
        ([LOST, REFUSED, 0], REFUSED),
        ([-9, 0], 137),
        ([STOPPED, 1], 1),
    ],
)
def test_one_exit_code_for_all_ranks(codes: list[int], expected: int) -> None:
    assert joint_code(codes) == expected


def test_a_signal_reaches_every_rank_even_before_it_listens(tmp_path: Path) -> None:
    """The ranks are this file's `listen`: they install a handler late, and leave with a code of their own."""
    rank = f"""
        import os, signal, sys, time
        open("{tmp_path}/started-" + os.environ["RANK"], "w").close()
        time.sleep(1)
        signal.signal(signal.SIGUSR1, lambda *_: sys.exit({STOPPED}))
        open("{tmp_path}/ready-" + os.environ["RANK"], "w").close()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
        time.sleep(60)
    """
    package = tmp_path / "spar_scale"  # stands in for the command line: the launcher runs it by its name
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "cli.py").write_text(textwrap.dedent(rank))
    launcher = f"""
        import os, sys
        sys.path.insert(0, "{ROOT}")
        from spar_scale.cluster.node import run_node
        os.chdir("{tmp_path}")
        sys.exit(run_node(["anything"], {STEP | {"SPAR_DEVICE": "cpu", "SPAR_PROCESSES": "2"}} | dict(os.environ)))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(launcher)], cwd=ROOT)
    try:
        while process.poll() is None and len(list(tmp_path.glob("started-*"))) < 2:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == STOPPED
        assert len(list(tmp_path.glob("ready-*"))) == 2
    finally:
        process.kill()


# -- a job's attempts -------------------------------------------------------------------------------


def test_attempts_without_a_new_checkpoint_are_counted_over_restarts(tmp_path: Path) -> None:
    job = Job("71", 0, 2)
    counts = []
    for step in (0, 0, 40, 40, 40, 40):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True, exist_ok=True)
        attempts = Attempts(tmp_path)
        attempts.add(job, LOST)
        counts.append(attempts.fruitless())
    assert counts == [1, 2, 0, 1, 2, 3] and counts[-1] == MAX_FRUITLESS


def test_outside_of_slurm_a_job_is_refused() -> None:
    with pytest.raises(UserError, match="not a SLURM job; submit a script of cluster/ with sbatch"):
        Job.of_environment({})


# -- the chain --------------------------------------------------------------------------------------


def test_a_chain_waits_for_what_it_starts_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    chain = submissions(Path("recipes/tiny"), Path("runs/a"))
    places = {one.name: number for number, one in enumerate(chain)}
    assert all(places[before] < places[one.name] for one in chain for before in one.after)
    joint = next(one for one in chain if one.name == "align_joint")
    assert {"align_connector", "tokenizer_encoder", "bootstrap_mllm", "world"} <= set(joint.after)
    assert "data.sources.0.shards=runs/a/data/scenes-*.tar" in joint.words_behind
    assert joint.environment == {"RECIPE": "recipes/tiny/align_joint.yaml", "RUN_DIR": "runs/a/align_joint"}
    assert set(chain[-1].after) == set(places) - {"world", "evaluate"} and chain[-1].script == "evaluate.sh"
    assert all((ROOT / "cluster" / one.script).exists() for one in chain)


def test_published_recipes_make_a_chain_without_a_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    chain = submissions(Path("recipes/spar_1b"), Path("runs/a"))
    assert [one.name for one in chain] == [
        "tokenizer_init", "tokenizer_decoder", "tokenizer_encoder", "tokenizer_high_resolution", "align_connector",
        "align_joint", "instruct",
    ]  # fmt: skip
    assert not chain[0].words_behind and not chain[0].after


def test_dry_run_prints_the_lines_and_submits_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SIZE", "smoke")
    monkeypatch.setenv("PATH", "")  # there is no sbatch to be found
    said = submit(Path("recipes/tiny"), Path("runs/a"), ["--nodes=3"], dry_run=True).splitlines()
    assert len(said) == 11 and all("sbatch --parsable" in line for line in said)
    assert "--dependency=afterok:${world}:${bootstrap_autoencoder}" in said[3] and "--nodes=3 cluster/" in said[3]
    assert "recipes/smoke/world.yaml" in said[0] and "--nodes=3 --nodes=1 cluster/stage0_world.sh" in said[0]
    assert said[-1].endswith("cluster/evaluate.sh --quick)")


def test_a_size_is_of_the_miniature_and_a_folder_has_recipes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SIZE", "huge")
    with pytest.raises(UserError, match=r"SIZE: found 'huge' .* must be demo or smoke or full"):
        submit(Path("recipes/tiny"), tmp_path, [], dry_run=True)
    monkeypatch.delenv("SIZE")
    with pytest.raises(UserError, match="holds no recipe of a phase"):
        submit(tmp_path, tmp_path, [], dry_run=True)


def test_a_chain_that_is_refused_half_way_is_cancelled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The programs are stand-ins of a SLURM that refuses a third job; a real one is in tests/slurm."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "sbatch").write_text(
        f"#!/bin/sh\necho x >> {tmp_path}/n\nn=$(wc -l < {tmp_path}/n)\n"
        '[ "$n" -lt 3 ] || { echo "no such partition" >&2; exit 1; }\necho $n\n'
    )
    (tmp_path / "scancel").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/cancelled\n')
    for name in ("sbatch", "scancel"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UserError, match="no such partition"):
        submit(Path("recipes/tiny"), tmp_path / "runs", [], dry_run=False)
    assert (tmp_path / "cancelled").read_text().split() == ["1", "2"]
    assert "cancelled the jobs submitted before: 1, 2" in capsys.readouterr().err


# -- preflight --------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    make_data(tmp_path / "data", edits=16)
    values = phase_values(tmp_path / "run", "bootstrap/autoencoder", tmp_path / "data", {}, "nano")
    return Recipe.model_validate_json(json.dumps(values))


def test_a_machine_that_can_train_is_fit(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPAR_DEVICE", "cpu")
    assert preflight(recipe) == 0
    said = capsys.readouterr().out
    assert "the next checkpoint takes 0.0" in said and "the first and the last can be read" in said
    assert "gpu        its checks are skipped on request (SPAR_DEVICE=cpu)" in said
    assert bad_nodes(recipe.run_dir, [socket.gethostname()]) == {}
    assert bad_nodes(recipe.run_dir, ["absent"]) == {"absent": "no findings: it died or hangs"}
    forget(recipe.run_dir)
    assert set(bad_nodes(recipe.run_dir, [socket.gethostname()])) == {socket.gethostname()}


def test_a_silent_node_is_to_blame_where_all_could_not_sum(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    for rank in (0, 1):
        found = [{"state": "bad", "subject": "all-reduce", "text": "could not meet"}]
        said = {"host": f"node{rank}", "rank": rank, "findings": found}
        (tmp_path / FOLDER / f"rank-{rank}.json").write_text(json.dumps(said))
    assert bad_nodes(tmp_path, ["node0", "node1"]) == dict.fromkeys(("node0", "node1"), "all-reduce: could not meet")
    assert list(bad_nodes(tmp_path, ["node0", "node1", "node2"])) == ["node2"]


def test_what_is_missing_is_named_with_its_node(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPAR_DEVICE", "cuda")  # there is none
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    for shard in Path(recipe.data.sources[0].shards).parent.glob("scenes-*.tar"):  # pyright: ignore[reportArgumentType]
        shard.write_bytes(shard.read_bytes()[:-1000])
    assert preflight(recipe) == DEFECT
    text = bad_nodes(recipe.run_dir, ["node7"])["node7"]
    assert "shards: " in text and "scenes-00000.tar" in text and "gpu: " in text


def test_a_recipe_that_no_stage_can_be_built_of_is_refused(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPAR_DEVICE", "cpu")
    model = recipe.model.model_copy(update={"pretrained": {"decoder": "../nowhere"}})
    assert preflight(recipe.model_copy(update={"model": model})) == REFUSED


def test_a_full_or_foreign_disk_is_bad(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPAR_DEVICE", "cpu")
    blocked = recipe.model_copy(update={"run_dir": recipe.run_dir.parent / "data" / "scenes-00000.tar" / "run"})
    assert preflight(blocked) == DEFECT  # a file stands where the directory should be: nothing can be written there

    kept = recipe.run_dir / "checkpoints" / "step-00000010"
    kept.mkdir(parents=True)
    with (kept / "__0_0.distcp").open("wb") as stream:
        stream.truncate(15 << 40)  # a hole of 15 TiB, which the next one would be
    assert preflight(recipe) == DEFECT
    found = json.loads((recipe.run_dir / FOLDER / "rank-0.json").read_text())["findings"]
    assert "bad" in {finding["state"] for finding in found if finding["subject"] == "disk"}


# -- a warning during the check of the nodes ---------------------------------------------------------------

SRUN = """#!/bin/sh
trap '' USR1
echo "$@" >> "$CALLS"
kill -USR1 $PPID
sleep 0.2
"""
SCONTROL = """#!/bin/sh
echo "scontrol $@" >> "$CALLS"
case "$1" in requeue) kill -TERM $PPID;; *) echo "JobState=RUNNING ExcNodeList=(null)";; esac
"""


def test_a_job_that_is_warned_before_it_trains_is_requeued_and_not_done(tmp_path: Path) -> None:
    """A check that passes is no training: a chain must not go on behind it."""
    make_data(tmp_path / "data", scenes=8)
    values = phase_values(tmp_path / "run", "bootstrap/autoencoder", tmp_path / "data", {}, "tiny")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(values))
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "1",
    }  # fmt: skip
    line = [sys.executable, "-m", "spar_scale.cli", "cluster", "job", str(recipe)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120, check=False)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert done.returncode == STOPPED and "done" not in done.stdout, done
    assert [call for call in calls if " doctor " in call] and not [call for call in calls if " train " in call]
    assert calls[-1] == "scontrol requeue 7"
    (attempt,) = json.loads((tmp_path / "run" / "attempts.json").read_text())
    assert attempt["exit_code"] == STOPPED
