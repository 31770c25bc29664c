"""Checkpoints across worlds: saved by some ranks, loaded by others, failing on all ranks alike."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch
from launching import WorldError, run_world
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.utils._python_dispatch import TorchDispatchMode
from toy_fragments import KINDS, SHAPES, full, toy_fragments, wrong_elements

from parallel import checkpoint
from parallel.checkpoint.boxes import Fragment
from parallel.checkpoint.manifest import manifest_hash, read_manifest
from parallel.errors import UserError

pytestmark = pytest.mark.world

# (tensor-parallel size, uneven data shares, every parameter shared out as under ZeRO-3)
LAYOUTS_OF_4 = [(1, (1, 2, 3, 5), False), (2, (3, 1), False), (2, (1, 4), True), (4, (1,), True)]
LAYOUTS_OF_3 = [(1, (5, 1, 1), True), (1, (1, 1, 1), False)]
LAYOUTS_OF_2 = [(2, (1,), False), (1, (1, 7), False), (1, (2, 1), True)]
STATE = {"samples": 640, "steps": {"main": 10}, "lr": 1e-4, "tracking": None}


def _whole(rank: int, value: float) -> dict[str, torch.Tensor]:
    """A discriminator that lives on the upper ranks only, as on the last pipeline stage."""
    return {"discriminator.weight": torch.full((3, 4), value)} if rank > 0 else {}


def _save_each(rank: int, size: int, root: Path, layouts: list) -> list[str]:
    paths = []
    for step, layout in enumerate(layouts, start=1):
        fragments = toy_fragments(rank, *layout, filled=True)
        paths.append(str(checkpoint.save(root, step, fragments, STATE, _whole(rank, 7.0), None, keep=10)))
    return paths


def _load_each(rank: int, size: int, paths: list[str], layouts: list) -> list[str]:
    wrong = []
    for path in paths:
        for layout in layouts:
            fragments, tensors = toy_fragments(rank, *layout, filled=False), _whole(rank, 0.0)
            state = checkpoint.load(Path(path), fragments, tensors, None)
            bad = wrong_elements(fragments)
            wrong += [f"{path} {layout}: {bad}"] if bad or state != STATE else []
            wrong += [f"{path}: whole"] if rank > 0 and not torch.all(tensors["discriminator.weight"] == 7.0) else []
    return wrong


@pytest.fixture(scope="module")
def saved_by_four(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return run_world(4, _save_each, tmp_path_factory.mktemp("four"), LAYOUTS_OF_4)[0]


@pytest.mark.parametrize(("size", "layouts"), [(2, LAYOUTS_OF_2), (3, LAYOUTS_OF_3), (4, LAYOUTS_OF_4)])
def test_any_layout_loads_what_any_layout_saved(saved_by_four: list[str], size: int, layouts: list) -> None:
    assert run_world(size, _load_each, saved_by_four, layouts) == [[]] * size


def test_plain_dcp_reads_the_files(saved_by_four: list[str]) -> None:
    for path in saved_by_four:
        tensors: dict[str, torch.Tensor] = {
            f"{kind}.{name}": torch.zeros(shape) for kind in KINDS for name, shape in SHAPES.items()
        }
        dcp_load({**tensors}, checkpoint_id=path, no_dist=True)
        assert all(torch.equal(tensors[f"{kind}.{name}"], full(name, kind)) for kind in KINDS for name in SHAPES)


def test_the_files_do_not_depend_on_who_wrote_them(saved_by_four: list[str]) -> None:
    keys = [read_manifest(Path(path)).keys for path in saved_by_four]
    assert keys[1:] == keys[:-1]


# -- every rank says the same ---------------------------------------------------------------------


def _refusals(rank: int, size: int, root: str, case: str) -> str:
    """Return the message this rank gets; the ranks differ in their part in the trouble."""
    fragments = toy_fragments(rank, 1, (1, 2, 1), per_parameter=True, filled=True)
    if case == "another model":
        fragments = [fragment for fragment in fragments if fragment.name != "conv"]
        if rank == 2:
            fragments.append(Fragment("convolution", (1,), 0, {"model": torch.zeros(1)}, None, True))
        if rank == 1:
            fragments = [
                f if f.name != "row" else Fragment("row", (8, 5), 13, f.tensors, None, True) for f in fragments
            ]
    try:
        if case == "file size limit" and rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        if case in ("file size limit", "gap"):
            lost = fragments[1:] if case == "gap" and rank == 1 else fragments
            checkpoint.save(Path(root), 9, lost, STATE, {}, None, keep=10)
        else:
            newest = checkpoint.find(Path(root), None)
            assert newest is not None
            checkpoint.load(newest, fragments, {}, None)
    except (UserError, ValueError) as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return f"{type(error).__name__}: {error}"
    return "nothing refused"


@pytest.fixture
def three(tmp_path: Path) -> Path:
    run_world(3, _save_each, tmp_path, [(1, (1, 2, 1), False), (1, (1, 1, 1), True)])
    return tmp_path


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("file size limit", ["UserError", "__1_0.distcp", "File too large"]),
        ("gap", ["ValueError", "of 60 elements are written"]),
        (
            "another model",
            ["of another model", "model.convolution", "did you mean 'model.conv'", "discriminator.weight", "(5, 8)"],
        ),
    ],
)
def test_a_failure_on_one_rank_is_the_same_message_on_all(three: Path, case: str, words: list[str]) -> None:
    before = {path: manifest_hash(path) for path in three.glob("step-*")}
    messages = run_world(3, _refusals, str(three), case)
    assert len(set(messages)) == 1
    assert [word for word in words if word not in messages[0]] == []
    assert {path: manifest_hash(path) for path in three.glob("step-*")} == before
    assert list(three.glob(".tmp-*")) == []


def _find(rank: int, size: int, root: str) -> str:
    return str(checkpoint.find(Path(root), None))


def test_a_damaged_file_of_any_rank_is_seen_by_all(three: Path) -> None:
    path = three / "step-00000002" / "__2_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
    assert run_world(2, _find, str(three)) == [str(three / "step-00000001")] * 2


def _die_while_writing(rank: int, size: int, root: str, event: str, word: str) -> None:
    """SIGKILL this rank just before the first file-system event that mentions `word`."""

    def hook(name: str, args: tuple) -> None:
        if name == event and word in str(args[0]):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    checkpoint.save(Path(root), 3, toy_fragments(rank, 1, (1, 2, 1), False, filled=True), STATE, {}, None, keep=10)


@pytest.mark.parametrize(
    ("rank", "event", "word"),
    [
        (1, "open", "__1_0.distcp"),
        (0, "open", ".metadata"),
        (0, "open", "manifest.json"),
        (0, "os.rename", ".tmp-step"),
    ],
)
def test_a_rank_killed_inside_a_save_leaves_the_one_before(three: Path, rank: int, event: str, word: str) -> None:
    with pytest.raises(WorldError) as caught:
        run_world(3, _die_while_writing, str(three), event, word)
    assert caught.value.exit_codes[rank] == -signal.SIGKILL
    assert list(three.glob(".tmp-step-00000003*")) != [] or rank != 0
    assert checkpoint.find(three) == three / "step-00000002"
    assert run_world(3, _save_each, three, [(1, (1, 1, 1), False)])  # and the next save goes through
    assert list(three.glob(".tmp-*")) == []


# -- a rank writes its share and no more ------------------------------------------------------------


class _LargestAllocation(TorchDispatchMode):
    """Records the largest floating-point storage any operation creates (collectives carry plans as bytes)."""

    def __init__(self) -> None:
        super().__init__()
        self.largest_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
                continue
            if tensor.untyped_storage().data_ptr() not in inputs:
                self.largest_bytes = max(self.largest_bytes, tensor.untyped_storage().nbytes())
        return result


def _transformer_shapes(width: int = 112, blocks: int = 12) -> dict[str, tuple[int, ...]]:
    """199 tensors, 1.95 M parameters."""
    shapes: dict[str, tuple[int, ...]] = {}
    for block in range(blocks):
        for name in ("q", "k", "v", "o"):
            shapes[f"{block}.{name}.weight"] = (width, width)
            shapes[f"{block}.{name}.bias"] = (width,)
        shapes |= {f"{block}.norm{index}": (width,) for index in range(4)}
        shapes |= {f"{block}.up.weight": (4 * width, width), f"{block}.up.bias": (4 * width,)}
        shapes |= {f"{block}.down.weight": (width, 4 * width), f"{block}.down.bias": (width,)}
    stem = {"conv0": (64, 3, 3, 3), "bias0": (64,), "conv1": (64, 64, 3, 3), "bias1": (64,)}
    return shapes | stem | {"patch": (width, 64, 2, 2), "words": (512, width), "positions": (width,)}


def _save_share(rank: int, size: int, root: str, per_parameter: bool) -> dict[str, int]:
    shapes = _transformer_shapes()
    counts = [torch.Size(shape).numel() for shape in shapes.values()]
    total = sum(counts)
    low, high = total * rank // size, total * (rank + 1) // size
    fragments, begin, share = [], 0, 0
    for (name, shape), count in zip(shapes.items(), counts, strict=True):
        if per_parameter:
            first, last = -(-count // size) * rank, min(-(-count // size) * (rank + 1), count)
        else:
            first, last = max(low - begin, 0), min(high - begin, count)
        begin += count
        if first < last:
            views = {kind: torch.randn(last - first) for kind in KINDS}
            fragments.append(Fragment(name, shape, first, views, None, True))
            share += len(KINDS) * 4 * (last - first)
    with _LargestAllocation() as allocations:
        path = checkpoint.save(Path(root), 1, fragments, {}, {}, None, keep=1)
    file_bytes = {file.name: file.stat().st_size for file in path.iterdir()}
    largest_share = max(view.nbytes for fragment in fragments for view in fragment.tensors.values())
    return {
        "share": share,
        "written": file_bytes[f"__{rank}_0.distcp"],
        "largest_allocation": allocations.largest_bytes,
        "largest_share": largest_share,
        "index": file_bytes[".metadata"] + file_bytes["manifest.json"],
    }


# The worst of 2, 3 and 4 ranks: the smallest shares, and the most boxes (shares that end inside rows).
@pytest.mark.parametrize(("size", "per_parameter"), [(4, False), (3, True)])
def test_a_rank_writes_its_share_and_allocates_no_full_tensor(tmp_path: Path, size: int, per_parameter: bool) -> None:
    for measured in run_world(size, _save_share, str(tmp_path), per_parameter):
        print(json.dumps(measured))
        assert measured["share"] <= measured["written"] <= 1.05 * measured["share"]
        assert measured["largest_allocation"] <= measured["largest_share"]
