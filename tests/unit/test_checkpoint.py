"""Checkpoints on one rank: what is found, refused, kept and survived."""

from __future__ import annotations

import enum
import json
import logging
import os
import pickle
import resource
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import run_world
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from toy_fragments import KINDS, full, toy_fragments, wrong_elements

from parallel import checkpoint
from parallel.checkpoint.boxes import Fragment
from parallel.checkpoint.manifest import MANIFEST, FileRecord, Manifest, read_manifest, references, sha256_of
from parallel.errors import UserError

DATA = "__0_0.distcp"


def _save(root: Path, step: int, keep: int = 10, **state: object) -> Path:
    fragments = toy_fragments(0, 1, (1,), per_parameter=False, filled=True)
    return checkpoint.save(root, step, fragments, {"step": step, **state}, {"critic": torch.ones(3)}, None, keep)


def _load(path: Path) -> dict:
    fragments = toy_fragments(0, 1, (1,), per_parameter=True, filled=False)
    critic = torch.zeros(3)
    state = checkpoint.load(path, fragments, {"critic": critic}, None)
    assert wrong_elements(fragments) == []
    assert critic.tolist() == [1, 1, 1]
    return state


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


def test_state_and_tensors_come_back(root: Path) -> None:
    state = {"lr": 1e-4, "groups": [{"name": "main", "step": 3}], "shards": None, "loss": 0.1 + 0.2}
    assert _load(_save(root, 5, **state)) == {"step": 5, **state}
    assert (root / "latest").read_text() == "step-00000005\n"


def test_nothing_is_found_where_nothing_was_saved(root: Path) -> None:
    assert checkpoint.find(root) is None


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"betas": (0.9, 0.95)}, "state.betas: tuple"),
        ({"a": {1: 2}}, "state.a: the key 1"),
        ({"t": torch.ones(1)}, "Tensor"),
    ],
)
def test_state_that_json_would_change_is_a_defect(root: Path, state: dict, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        _save(root, 1, **state)
    assert checkpoint.find(root) is None


# -- damage -----------------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


_DAMAGES = [
    (DATA, _flip, "sha256 differs"),
    (DATA, _cut_short, "bytes, the manifest has"),
    (DATA, Path.unlink, "missing"),
    (".metadata", _flip, "sha256 differs"),
    (".metadata", Path.unlink, "missing"),
    (MANIFEST, _flip, "manifest.json: "),
    (MANIFEST, _cut_short, "unreadable|damaged"),
    (MANIFEST, Path.unlink, "missing"),
    (MANIFEST, lambda path: path.write_text("[]"), "unreadable"),
    (MANIFEST, lambda path: path.write_text(path.read_text().replace('"step":20', '"step":21')), "damaged"),
    (MANIFEST, lambda path: path.write_text(path.read_text().replace('"format":1', '"format":9')), "format 9"),
]


@pytest.mark.parametrize(("file", "damage", "reason"), _DAMAGES)
def test_a_damaged_newest_is_named_and_the_one_before_is_used(
    root: Path, caplog: pytest.LogCaptureFixture, file: str, damage, reason: str
) -> None:
    before, newest = _save(root, 10), _save(root, 20)
    damage(newest / file)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.find(root) == before
    (warning,) = [record for record in caplog.records if record.name == "parallel.checkpoint"]
    assert str(newest / file) in warning.getMessage()
    for refusing in (checkpoint.verify, _load):
        with pytest.raises(UserError, match=reason) as caught:
            refusing(newest)
        assert str(newest / file) in str(caught.value)


def test_all_damaged_is_refused_with_every_name(root: Path) -> None:
    paths = [_save(root, 10), _save(root, 20)]
    for path in paths:
        _flip(path / DATA)
    with pytest.raises(UserError, match="every checkpoint is damaged") as caught:
        checkpoint.find(root)
    assert all(str(path / DATA) in str(caught.value) for path in paths)


def test_latest_is_not_trusted(root: Path) -> None:
    path = _save(root, 10)
    (root / "latest").write_text("step-00000099\n")
    assert checkpoint.find(root) == path


def test_a_damaged_checkpoint_is_replaced_when_training_comes_past_it_again(root: Path) -> None:
    _save(root, 10)
    _flip(_save(root, 20) / DATA)
    assert _load(_save(root, 20)) == {"step": 20}
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000010", "step-00000020"]


# -- another model ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: Fragment("gaet", f.shape, f.start, f.tensors, f.cut, True), ["model.gaet", "did you mean", "gate"]),
        (
            lambda f: Fragment("gate", (5, 8), f.start, f.tensors, f.cut, True),
            ["model.gate: float32 (8, 5) in", "(5, 8)"],
        ),
        (
            lambda f: Fragment("gate", f.shape, 0, {k: v.double() for k, v in f.tensors.items()}, None, True),
            ["float64 (8, 5) here"],
        ),
        (lambda f: None, ["4 in it that this model does not have", "exp_avg.gate"]),
    ],
    ids=["name", "shape", "dtype", "absent"],
)
def test_a_checkpoint_of_another_model_is_refused_in_names(root: Path, change, words: list[str]) -> None:
    path = _save(root, 1)
    fragments = toy_fragments(0, 1, (1,), per_parameter=True, filled=False)
    changed = [change(fragment) if fragment.name == "gate" else fragment for fragment in fragments]
    with pytest.raises(UserError, match="of another model") as caught:
        checkpoint.load(path, [fragment for fragment in changed if fragment], {"critic": torch.zeros(3)}, None)
    assert [word for word in words if word not in str(caught.value)] == []
    assert all(torch.all(view == 0) or torch.all(view == -1) for f in fragments for view in f.tensors.values())


def test_the_ema_can_be_loaded_as_the_start_of_the_next_phase(root: Path) -> None:
    path = _save(root, 1)
    fragments = toy_fragments(0, 1, (1,), per_parameter=False, filled=False)
    checkpoint.load(path, fragments, {}, None, kinds={"model": "ema", "ema": "ema"})
    for fragment in fragments:
        start = full(fragment.name, "ema").reshape(-1)
        assert torch.equal(fragment.tensors["model"], start)
        assert torch.equal(fragment.tensors["ema"], start)
        assert torch.all(fragment.tensors["exp_avg"] == -1)  # untouched


def test_read_gives_whole_tensors(root: Path) -> None:
    path = _save(root, 1)
    read = checkpoint.read(path, "ema")
    assert read.keys() == {"block.weight", "block.bias", "conv", "scale", "gate", "row"}
    assert all(torch.equal(tensor, full(name, "ema")) for name, tensor in read.items())
    assert checkpoint.read(path, None)["critic"].tolist() == [1, 1, 1]
    with pytest.raises(UserError, match=r"nothing of kind 'momentum_buffer' \(it holds ema, exp_avg"):
        checkpoint.read(path, "momentum_buffer")


# -- nothing is executed --------------------------------------------------------------------------------


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def _restate(path: Path) -> None:
    """Make the manifest agree with whatever the files are now, as an attacker would."""
    old = read_manifest(path)
    files = {name: FileRecord((path / name).stat().st_size, sha256_of(path / name)) for name in old.files}
    Manifest(old.step, files, old.keys, old.state).write(path)


def _malicious_pickle(path: Path, trap: Path) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(_Touch(trap)))


def _malicious_bytes_entry(path: Path, trap: Path) -> None:
    """A non-tensor entry is what DCP would unpickle without restriction."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.state_dict_metadata["model.scale"] = BytesStorageMetadata()
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def _malicious_tensor(path: Path, trap: Path) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    with (path / DATA).open("ab") as stream:
        for place in metadata.storage_data.values():
            place.offset, start = stream.tell(), stream.tell()
            torch.save(_Touch(trap), stream, _use_new_zipfile_serialization=False)
            place.length = stream.tell() - start
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def _foreign_file(path: Path, trap: Path) -> None:
    shutil.copy(path / DATA, path.parent / "elsewhere.distcp")
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = "../elsewhere.distcp"
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


class _Attribute:
    def __reduce__(self):
        return (getattr, (torch.Size, "__subclasses__"))


def _attribute_of_a_class(path: Path, trap: Path) -> None:
    """`getattr` is allowed for members of one enumeration, and must give nothing else."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.planner_data = _Attribute()
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


ATTACKS = [_malicious_pickle, _malicious_bytes_entry, _malicious_tensor, _foreign_file, _attribute_of_a_class]


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("way", ["load", "read"])
def test_a_malicious_checkpoint_executes_nothing(root: Path, tmp_path: Path, attack, way: str) -> None:
    path, trap = _save(root, 1), tmp_path / "executed"
    attack(path, trap)
    _restate(path)
    checkpoint.verify(path)  # the hashes agree: what refuses below is the reader
    with pytest.raises((UserError, RuntimeError)) as caught:
        _load(path) if way == "load" else checkpoint.read(path, "model")
    assert attack is _malicious_tensor or isinstance(caught.value, UserError)
    assert not trap.exists()


class _EarlierPickler(pickle.Pickler):
    """Python 3.11.2 pickles a member of an enumeration by its name."""

    def reducer_override(self, obj: Any) -> Any:
        return (getattr, (type(obj), obj.name)) if isinstance(obj, enum.Enum) else NotImplemented


def test_a_checkpoint_of_an_earlier_python_is_read(root: Path) -> None:
    path = _save(root, 1)
    with (path / ".metadata").open("rb") as stream:
        metadata = pickle.load(stream)
    with (path / ".metadata").open("wb") as stream:
        _EarlierPickler(stream).dump(metadata)
    assert b"getattr" in (path / ".metadata").read_bytes()
    _restate(path)
    assert _load(path) == {"step": 1}


# -- keeping and protecting -----------------------------------------------------------------------------


def test_runs_that_start_together_are_all_noted(root):
    path, names = _save(root, 1, keep=2), [f"../run-{i}" for i in range(16)]
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(lambda name: checkpoint.protect(path, by=name), names))
    assert sorted(references(path)) == sorted(names)


def test_the_newest_n_are_kept_and_a_referenced_one_stays(root: Path) -> None:
    checkpoint.protect(_save(root, 1, keep=2), by="../align_connector")
    for step in (2, 3, 4):
        _save(root, step, keep=2)
    assert sorted(path.name for path in root.glob("step-*")) == ["step-00000001", "step-00000003", "step-00000004"]
    assert references(root / "step-00000001") == ["../align_connector"]
    assert _load(root / "step-00000001") == {"step": 1}  # the mark does not change the checkpoint


def test_a_sound_referenced_checkpoint_is_not_replaced(root: Path) -> None:
    path = _save(root, 1)
    before = checkpoint.manifest_hash(path)
    checkpoint.protect(path, by="../b")
    with pytest.raises(UserError, match=r"because ../b refers to it"):
        _save(root, 1)
    assert checkpoint.manifest_hash(path) == before


def test_what_an_abandoned_lineage_left_is_removed(root: Path) -> None:
    for step in (1, 3):
        _save(root, step)
    _flip(root / "step-00000003" / DATA)
    newest = checkpoint.find(root)
    assert newest == root / "step-00000001"
    _save(root, 2)
    assert checkpoint.find(root) == root / "step-00000002"
    assert not (root / "step-00000003").exists()


# -- the disk and the killer ------------------------------------------------------------------------------


def _save_under_limit(rank: int, size: int, root: str, num_bytes: int) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    try:
        _save(Path(root), 2, note="x" * 50_000)
    except UserError as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize(("num_bytes", "file"), [(1000, DATA), (40_000, MANIFEST)])
def test_a_full_disk_names_the_file_and_leaves_nothing(root: Path, num_bytes: int, file: str) -> None:
    before = checkpoint.manifest_hash(_save(root, 1))
    (message,) = run_world(1, _save_under_limit, str(root), num_bytes, initialise=False)
    assert "File too large" in message
    assert file in message
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000001"]
    assert checkpoint.manifest_hash(root / "step-00000001") == before


def _watch(root: str, reached: list[int], kill_at: int | None) -> None:
    """Count this process's file-system events under `root`; SIGKILL it just before event `kill_at`."""

    def hook(event: str, args: tuple) -> None:
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and root in str(args[0]):
            if reached[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            reached[0] += 1

    sys.addaudithook(hook)


def _kill_at_every_event(rank: int, size: int, root_text: str) -> list[str]:
    """Save step 2 over and over, killed one event later each time, until it goes through; return what was wrong."""
    root, wrong, seen = Path(root_text), [], set()
    for event in range(200):
        shutil.rmtree(root, ignore_errors=True)
        before = _save(root, 1, keep=1)
        kept = checkpoint.manifest_hash(before)
        child = os.fork()
        if child == 0:
            _watch(root_text, [0], event)
            _save(root, 2, keep=1)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = checkpoint.find(root)
        if found is None or (found == before and checkpoint.manifest_hash(found) != kept):
            wrong.append(f"event {event}: found {found}")
        elif _load(found)["step"] != int(found.name[-1]):
            wrong.append(f"event {event}: content of {found}")
        try:
            checkpoint.verify(root)
        except UserError as error:
            wrong.append(f"event {event}: {error}")
        again = _save(root, 2 if found == before else 3, keep=1)  # the resumed run
        left = sorted(path.name for path in root.iterdir())
        if left != ["latest", again.name]:
            wrong.append(f"event {event}: left {left}")
        seen.add((code, found and found.name))
        if code == 0:
            break
    expected = {(-signal.SIGKILL, "step-00000001"), (-signal.SIGKILL, "step-00000002"), (0, "step-00000002")}
    return wrong + ([] if seen == expected else [f"outcomes {seen}"])


def test_killed_at_every_file_system_event_of_a_save(root: Path) -> None:
    assert run_world(1, _kill_at_every_event, str(root), initialise=False) == [[]]


def _killed_by_the_limit(rank: int, size: int, root: str) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    child = os.fork()
    if child == 0:
        _save(Path(root), 2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGXFSZ


def test_killed_in_the_middle_of_a_write(root: Path) -> None:
    before = _save(root, 1)
    run_world(1, _killed_by_the_limit, str(root), initialise=False)
    assert (root / ".tmp-step-00000002" / DATA).stat().st_size == 3000
    assert checkpoint.find(root) == before
    checkpoint.remove_leftovers(root)
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000001"]


def _save_on_a_failing_disk(rank: int, size: int, root: str) -> str:
    """Flip a bit of the data file after it is written, just before it is read back."""
    hit = []

    def hook(event: str, args: tuple) -> None:
        if event == "open" and str(args[0]).endswith(DATA) and args[1] == "r" and not hit:
            hit.append(True)
            _flip(Path(args[0]))

    sys.addaudithook(hook)
    try:
        _save(Path(root), 2)
    except UserError as error:
        return str(error)
    return "saved"


def test_what_the_disk_gives_back_is_compared_with_what_was_written(root: Path) -> None:
    before = _save(root, 1)
    (message,) = run_world(1, _save_on_a_failing_disk, str(root), initialise=False)
    assert f".tmp-step-00000002/{DATA}: the content read back differs from the content written" in message
    assert checkpoint.find(root) == before


def test_an_unwritable_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*Not a directory.*writable"):
        _save(tmp_path / "file" / "checkpoints", 1)


# -- what a person asks -----------------------------------------------------------------------------------


def test_inspect_and_verify_take_a_run_a_folder_or_a_checkpoint(root: Path) -> None:
    path = _save(root, 7, samples=448)
    for place in (root.parent, root, path):
        assert f"{path}: intact (2 files" in checkpoint.verify(place)
        text = checkpoint.inspect(place)
        assert "step 7" in text
        assert "samples: 448" in text
        assert all(f"  {kind}: 6 tensors, " in text for kind in KINDS)
    with pytest.raises(UserError, match="no checkpoints here"):
        checkpoint.inspect(root.parent.parent)


def test_the_manifest_holds_no_path_of_the_machine(root: Path) -> None:
    path = _save(root, 1)
    for file in (path / MANIFEST, path / ".metadata"):
        assert str(root.parent).encode() not in file.read_bytes()
    assert set(json.loads((path / MANIFEST).read_text())["body"]) == {"step", "files", "keys", "state"}
