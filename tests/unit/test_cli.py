"""The command line: quick without torch, one message and exit code 2 for what a person can mend."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spar_scale.cli import main

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "recipes/tiny/tokenizer_init.yaml"
WORLD = ROOT / "recipes/tiny/world.yaml"


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "spar_scale.cli", *words],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_help_takes_less_than_a_second():
    seconds = []
    for _ in range(3):  # the fastest of three: the machine may be busy
        start = time.perf_counter()
        assert run("--help").returncode == 0
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0


@pytest.mark.parametrize(
    "words",
    [["--help"], ["train", "--help"], ["train", str(TOKENIZER), "precision=fp16"], ["train", "nowhere.yaml"]],
    ids=["help", "command-help", "refused-recipe", "missing-recipe"],
)
def test_nothing_heavy_is_imported_for_help_or_a_refused_recipe(words: list[str]):
    code = (
        "import sys; from spar_scale.cli import main\n"
        f"try: main({words!r})\n"
        "except SystemExit: pass\n"
        "print('HEAVY', sorted({'torch', 'numpy', 'deepspeed', 'transformers', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout


CASES = [
    (["train", str(TOKENIZER), "train.stepz=1"], ["train.stepz: found an unknown key", "did you mean 'steps'?"]),
    (["train", str(TOKENIZER), "seed=x", "precision=y"], ["2 errors", "seed:", "precision:"]),
    (["train", "nowhere.yaml"], ["nowhere.yaml: No such file"]),
    (["train", "."], ["directory"]),
    (["data", "make", str(WORLD), "size=big", "--out", "unused"], ['size: found "big"']),
    (["data", "make", str(WORLD), "--out", "unused", "sizes=1"], ["sizes: found an unknown key", "'size'"]),
]


@pytest.mark.parametrize(("words", "expected"), CASES, ids=lambda value: " ".join(value[:1] + value[2:])[:50])
def test_refusal_is_one_message_and_exit_code_2(words: list[str], expected: list[str]):
    done = run(*words)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert not (ROOT / "unused").exists()
    for text in expected:
        assert text in done.stderr


@pytest.mark.parametrize(
    "words",
    [[], ["trian"], ["train"], ["data", "show", "x.tar", "--count", "0"], ["checkpoint", "inspect", "x", "a=b"],
     ["train", "x.yaml", "--fast"], ["demo", "--size", "huge"]],
    ids=lambda words: " ".join(words) or "nothing",
)  # fmt: skip
def test_unknown_words_are_refused_by_the_parser(words: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "usage: spar-scale" in capsys.readouterr().err


MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "8"}
RANKS = {  # who prints a refusal that every rank meets, and how
    "alone": ({}, "error: "),
    "first of torchrun": ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0"} | MEETING, "error: "),
    "second of a node": ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"} | MEETING, ""),
    "first of the second node": ({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"} | MEETING, "error (rank 2): "),
    "RANK alone, as in a shell of a pod": ({"RANK": "3"}, "error: "),
    "rank out of its world": ({"RANK": "3", "WORLD_SIZE": "2", "LOCAL_RANK": "1"} | MEETING, "error: "),
    "first of srun": (STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, "error: "),
    "another of srun": (STEP | {"SLURM_PROCID": "3", "SLURM_LOCALID": "3"}, ""),
    "SLURM_PROCID alone": ({"SLURM_PROCID": "3"}, "error: "),
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch):
    """Set the variables of a launcher, and none else."""

    def put(variables: dict[str, str]) -> None:
        for name in [name for name in os.environ if name.startswith("SLURM_")]:
            monkeypatch.delenv(name)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", *MEETING):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize("case", RANKS)
@pytest.mark.parametrize("words", [["train", "nowhere.yaml"], ["doctor", "nowhere.yaml"]], ids=lambda words: words[0])
def test_a_refusal_that_all_ranks_meet_is_printed_once_on_each_node(
    words: list[str], case: str, environment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    variables, prefix = RANKS[case]
    environment(variables)
    monkeypatch.delitem(sys.modules, "torch", raising=False)  # a recipe is refused before torch is imported
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert printed == (
        f"{prefix}{words[1]}: No such file or directory; expected a readable YAML file\n" if prefix else ""
    )


OF_NO_WORLD = [
    ["data", "import", "nowhere", "--out", "out"],
    ["data", "index", "nowhere.tar"],
    ["data", "encode", "nowhere.yaml"],
    ["data", "make", "nowhere.yaml", "--out", "out"],
    ["checkpoint", "verify", "nowhere"],
    ["track", "sync", "nowhere"],
    ["plan", "nowhere.yaml", "--gpus", "2"],
    ["parity", "--recipe", "nowhere.yaml"],
    ["report", "nowhere"],
    ["cluster", "job", "nowhere.yaml"],
    ["cluster", "submit", "nowhere", "out"],
]


@pytest.mark.parametrize("case", ["second of a node", "another of srun", "RANK alone, as in a shell of a pod"])
@pytest.mark.parametrize("words", OF_NO_WORLD, ids=lambda words: " ".join(words[:2]))
def test_a_command_that_is_started_once_prints_its_refusal_whatever_the_rank(
    words: list[str], case: str, environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    environment(RANKS[case][0])
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_node_that_cannot_start_its_ranks_names_itself(environment, capsys: pytest.CaptureFixture[str]):
    environment(STEP | {"SLURM_PROCID": "3", "SLURM_LOCALID": "0"})
    assert main(["cluster", "node", "train", "x.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error (rank 3): SLURM_NODEID")


def test_doctor_finds_this_environment_fit():
    done = run("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ready to run" in done.stdout and "apex_adam" in done.stdout


def test_doctor_names_another_package_called_parallel(tmp_path: Path):
    (tmp_path / "parallel.py").write_text("")
    code = (
        "import sys, spar_scale.doctor.machine as doctor\n"
        "for name in [n for n in sys.modules if n.split('.')[0] == 'parallel']: del sys.modules[name]\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "print(doctor.our_parallel())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "state='bad'" in done.stdout and str(tmp_path) in done.stdout


def test_a_pipeline_longer_than_the_phase_is_refused_before_any_rank_is_met():
    """No other rank of this world is there: a process group could not be made."""
    world = {"RANK": "0", "WORLD_SIZE": "64", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    changes = ("parallel.pipeline=64", "optimizer.name=adamw", "optimizer.clip=1.0")
    done = run("train", str(TOKENIZER), *changes, **world)
    assert done.returncode == 2
    assert "parallel.pipeline: found 64, but this phase has" in done.stderr and "nearest that fit 64" in done.stderr
