"""What lies beside the checkpoints may be torn, missing or read-only: the run goes on, or says which file and why."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import resource
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_runs import recipe_values

from parallel import checkpoint
from parallel.checkpoint import manifest
from parallel.checkpoint.boxes import Fragment
from parallel.errors import UserError
from parallel.launch.run_lock import RunLock
from spar_scale.config.recipe import Recipe, load_recipe
from spar_scale.training.parent import choose_parent
from spar_scale.training.run_directory import refuse_another
from spar_scale.training.tracking import FILES, RunLog, noted_artifacts, read_lines, run_id


def recipe_of(run_dir: Path, **changes) -> Recipe:
    changes = {"phase": "decoder", "objective": {"perceptual_weight": 0.5}, "optimizer__groups": {}} | changes
    values = recipe_values(run_dir, "scenes.tar", Path("autoencoder"), **changes)
    return Recipe.model_validate_json(json.dumps(values))


def save_checkpoint(run_dir: Path, step: int = 1) -> Path:
    fragment = Fragment("weight", (2,), 0, {"ema": torch.zeros(2)}, None, writes=True)
    state = {"step": step, "recipe": {"train": {"steps": step}}}
    return checkpoint.save(run_dir / "checkpoints", step, [fragment], state, {}, None, keep=5)


def write_logs(run_dir: Path, steps: int) -> None:
    log = RunLog(run_dir, 0)
    for step in range(1, steps + 1):
        log.metrics([{"step": step, "loss": 0.5}])
        log.samples(step, [step])
        log.bad_samples(step, [{"key": "k"}])
    log.close()


DAMAGES = {
    "NUL bytes": b"\0\0\0\0",
    "a torn line": b'{"step": 3, "lo',
    "no UTF-8": b'{"step": "\xff"}',
    "no object": b"3",
    "no step": b'{"loss": 0.5}',
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("end", [b"\n", b""])
def test_what_is_damaged_behind_the_checkpoint_is_cut_off_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str, end: bytes
) -> None:
    write_logs(tmp_path, 4)
    lines = (tmp_path / name).read_bytes().split(b"\n")
    (tmp_path / name).write_bytes(b"\n".join([*lines[:2], DAMAGES[damage], lines[3]]) + end)
    RunLog(tmp_path, 2).close()
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert str(tmp_path / name) in warning and "line 3" in warning
    for file in FILES:
        assert [line["step"] for line in read_lines(tmp_path / file)] == [1, 2]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_line_before_the_checkpoint_is_refused_by_number_and_kept(
    tmp_path: Path, name: str, damage: str
) -> None:
    write_logs(tmp_path, 4)
    lines = (tmp_path / name).read_bytes().split(b"\n")
    (tmp_path / name).write_bytes(b"\n".join([lines[0], DAMAGES[damage], *lines[2:]]))
    before = (tmp_path / name).read_bytes()
    with pytest.raises(UserError, match=rf"{name}: line 2 is damaged, .*; restore .*\(sed -i 2d .*step 3"):
        RunLog(tmp_path, 3)
    with pytest.raises(UserError, match=rf"{name}: line 2 is damaged"):
        read_lines(tmp_path / name)
    assert (tmp_path / name).read_bytes() == before


def test_the_last_lines_of_the_checkpoints_steps_are_refused_too(tmp_path: Path) -> None:
    write_logs(tmp_path, 4)
    lines = (tmp_path / "metrics.jsonl").read_bytes().split(b"\n")
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*lines[:2], b"\0\0", b""]))
    with pytest.raises(UserError, match="line 3 is damaged"):
        RunLog(tmp_path, 3)


def test_logs_that_are_gone_are_begun_anew(tmp_path: Path) -> None:
    write_logs(tmp_path, 4)
    for name in FILES:
        (tmp_path / name).unlink()
    log = RunLog(tmp_path, 4)
    log.metrics([{"step": 5, "loss": 0.5}])
    log.close()
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [5]


@pytest.mark.parametrize("content", [b"", b"\0\0", b'{"id": "a', b"[]", b"{}", b'{"id": 3}', b"\xff"])
@pytest.mark.parametrize("known", ["fromthecheckpoint", None])
def test_a_damaged_id_is_made_anew_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes, known: str | None
) -> None:
    (tmp_path / "tracking.json").write_bytes(content)
    assert noted_artifacts(tmp_path) == []
    made = run_id(tmp_path, known)
    assert made == (known or made) and len(made) > 1
    assert run_id(tmp_path) == made and json.loads((tmp_path / "tracking.json").read_text()) == {"id": made}
    assert str(tmp_path / "tracking.json") in caplog.text and "written again" in caplog.text
    assert os.listdir(tmp_path) == ["tracking.json"]


@pytest.mark.parametrize(
    "content", ["", "[]", '"run"', '{"run": "../p"}', '{"run": 1, "checkpoint": 2, "manifest": 3}']
)
def test_a_damaged_record_of_the_parent_is_refused_by_name(tmp_path: Path, content: str) -> None:
    recipe = recipe_of(tmp_path / "run", init_from="../p")
    save_checkpoint(tmp_path / "run")
    (tmp_path / "run" / "parent.json").write_text(content)
    with pytest.raises(UserError, match=r"parent\.json: is damaged, must be a JSON object .*; restore it"):
        choose_parent(recipe, None)


@pytest.mark.parametrize("content", ["", "{", '{"pid": 3}', "\0"])
def test_a_torn_lock_file_of_a_dead_run_is_taken_over(tmp_path: Path, content: str) -> None:
    (tmp_path / "lock").write_text(content)
    with RunLock(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


# -- the recipe and the parent of a run that has trained nothing -----------------------------------


def test_a_start_that_trained_nothing_binds_no_later_one(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for name in ("p", "q"):
        save_checkpoint(tmp_path / name)
    wrong, right = (recipe_of(run_dir, init_from=f"../{name}", seed=seed) for name, seed in (("p", 1), ("q", 2)))
    run_dir.mkdir()
    wrong.save(run_dir / "recipe.yaml")
    choose_parent(wrong, None)
    write_logs(run_dir, 2)
    refuse_another(run_dir / "recipe.yaml", right)
    choose_parent(right, None)
    assert json.loads((run_dir / "parent.json").read_text())["run"] == "../q"


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("trained", [save_checkpoint, lambda run_dir: (run_dir / "pretrained").mkdir(parents=True)])
def test_a_run_that_has_trained_keeps_its_recipe_and_parent(
    tmp_path: Path, trained: Callable[[Path], object], damaged: bool
) -> None:
    run_dir = tmp_path / "run"
    for name in ("p", "q"):
        save_checkpoint(tmp_path / name)
    first, other = (recipe_of(run_dir, init_from=f"../{name}", seed=seed) for name, seed in (("p", 1), ("q", 2)))
    run_dir.mkdir()
    first.save(run_dir / "recipe.yaml")
    choose_parent(first, None)
    trained(run_dir)
    for file in run_dir.glob("checkpoints/step-*/manifest.json"):
        file.write_text("" if damaged else file.read_text())
    with pytest.raises(UserError, match="holds a run of another recipe; it differs in init_from, seed"):
        refuse_another(run_dir / "recipe.yaml", other)
    with pytest.raises(UserError, match=r"found \.\./q, but this run started from \.\./p"):
        choose_parent(other, None)


# -- what cannot be written ------------------------------------------------------------------------


@contextmanager
def small_files(most_bytes: int):
    """Within it no file may grow beyond so many bytes: what a full disk does to a writer."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_parent_on_a_full_disk_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "p")
    recipe = recipe_of(tmp_path / "run", init_from="../p")
    (tmp_path / "run").mkdir()
    with small_files(4), pytest.raises(UserError, match=r"referenced-by\.json: .*File too large"):
        choose_parent(recipe, None)
    assert not (tmp_path / "run" / "parent.json").exists()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_parent_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    """No test may mount a disk read-only, so its answer stands in for one."""

    def refuse(path: Path, content: str) -> None:
        raise UserError(f"{path}: cannot be written ({os.strerror(code)})") from OSError(code, os.strerror(code))

    found = save_checkpoint(tmp_path / "p")
    recipe = recipe_of(tmp_path / "run", init_from="../p")
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(manifest, "write_file", refuse)
    choose_parent(recipe, None)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert any(os.strerror(code) in text and f"keep a copy of {found}" in text for text in warnings)
    assert json.loads((tmp_path / "run" / "parent.json").read_text())["checkpoint"] == found.name


def test_a_checkpoint_that_another_process_holds_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = save_checkpoint(tmp_path)
    monkeypatch.setattr(manifest, "LOCK_S", 0.2)
    with (found / "manifest.json").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"manifest\.json: locked by another process for 0\.2 s"):
            checkpoint.protect(found, by="a run")
    checkpoint.protect(found, by="a run")
    assert manifest.references(found) == ["a run"]


NAMES = ["a name with spaces", "exp #3", "versuch-größe-实验", "a?b=c&d%20", "x" * 250, "-leading", "[0-9]*"]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_directory_of_any_name_keeps_its_files(tmp_path: Path, name: str) -> None:
    run_dir = tmp_path / name
    with RunLock(run_dir):
        recipe_of(run_dir).save(run_dir / "recipe.yaml")
        write_logs(run_dir, 2)
        found = save_checkpoint(run_dir, step=2)
        made = run_id(run_dir)
    assert checkpoint.find(run_dir / "checkpoints") == found and run_id(run_dir) == made
    assert load_recipe(run_dir / "recipe.yaml").run_dir == run_dir
    assert len(read_lines(run_dir / "metrics.jsonl")) == 2


def test_a_log_on_a_full_disk_is_refused_by_name(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    with small_files(100), pytest.raises(UserError, match=r"metrics\.jsonl in the run directory: File too large; free"):
        log.metrics([{"step": step, "loss": 0.5} for step in range(1, 50)])


@pytest.mark.parametrize("lost", [".metadata", "__0_0.distcp", "manifest.json"])
@pytest.mark.parametrize("empty", [False, True])
def test_a_checkpoint_with_a_lost_or_empty_file_is_skipped_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lost: str, empty: bool
) -> None:
    whole, damaged = save_checkpoint(tmp_path, step=1), save_checkpoint(tmp_path, step=2)
    (damaged / lost).unlink()
    if empty:
        (damaged / lost).touch()
    assert checkpoint.find(tmp_path / "checkpoints") == whole
    assert f"damaged checkpoint {damaged} skipped: {damaged / lost}: " in caplog.text
