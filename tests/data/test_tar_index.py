"""Indexes of tar shards: what is found, and how everything that is not a sound shard is refused."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from parallel.errors import UserError
from spar_scale.data.commands import index, show
from spar_scale.data.storage import expand_shards, read_member
from spar_scale.data.tar_index import VERSION, index_path, index_shard, read_header, read_index, write_index


def refusal(action, *given) -> str:
    with pytest.raises(UserError) as caught:
        action(*given)
    return str(caught.value)


def test_members_are_found_where_they_lie(make_shard):
    samples = {"a": {"png": b"1" * 700, "txt": b""}, "dir.x/b": {"input.png": b"2", "json": b"{}"}, "c": {"txt": b"3"}}
    shard = make_shard(samples)
    found = read_index(shard)
    assert found.keys == ("a", "dir.x/b", "c") and len(found) == 3
    assert read_header(shard).samples == 3
    for sample, members in enumerate(samples.values()):
        table = found.members(sample)
        assert {name: read_member(shard, *place) for name, place in table.items()} == members


def test_the_index_agrees_with_webdataset(tiny_world):
    from webdataset.tariterators import tarfile_to_samples

    shard = str(tiny_world / "edits-00001.tar")
    found = read_index(shard)
    streamed = list(tarfile_to_samples()([{"url": shard, "stream": open(shard, "rb")}]))  # noqa: SIM115
    assert [sample["__key__"] for sample in streamed] == list(found.keys)
    for number, sample in enumerate(streamed):
        for name, place in found.members(number).items():
            assert read_member(shard, *place) == sample[name]


def test_a_tar_of_another_program_is_read(tmp_path):
    (tmp_path / "d").mkdir()
    for name in ("a.txt", "b.txt", "._a.txt", "README"):
        (tmp_path / "d" / name).write_bytes(name.encode())
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.add(tmp_path / "d", "d" + "x" * 120)
    found = index_shard(str(path))
    assert sorted(key[-2:] for key in found.keys) == ["/a", "/b"]


def test_indexing_twice_writes_the_same_bytes(make_shard):
    shard = make_shard({"a": {"txt": b"1"}})
    before = Path(index_path(shard)).read_bytes()
    index([shard])
    assert Path(index_path(shard)).read_bytes() == before
    assert [name for name in os.listdir(Path(shard).parent) if name.endswith(".tmp")] == []


def tar_bytes(*names: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 600
            tar.addfile(info, io.BytesIO(b"x" * 600))
    return buffer.getvalue()


WHOLE = tar_bytes("a.txt", "b.txt")  # members at 512 and 2048, data padded to 1024, end at 3072
DAMAGED = {
    "empty": (b"", "the file is empty; a shard is an uncompressed tar with at least one sample"),
    "not a tar": (b"hello, this is a text file\n" * 100, "is not an uncompressed tar"),
    "short text": (b"hello", "is not an uncompressed tar"),
    "compressed": (gzip.compress(WHOLE), "is not an uncompressed tar"),
    "no samples": (tar_bytes(), "the tar holds no sample; a sample is a member named KEY.EXTENSION"),
    "no extension": (tar_bytes("README"), "the tar holds no sample"),
    "cut in the data": (WHOLE[:2300], "is truncated or damaged"),
    "cut in a header": (WHOLE[:1700], "is truncated or damaged"),
    "cut between members": (WHOLE[:1536], "is truncated or damaged at byte 1536 of 1536; a complete tar ends with"),
    "damaged header": (WHOLE[:1600] + b"\xff" * 64 + WHOLE[1664:], "is truncated or damaged at byte 1536 of"),
    "repeated member": (tar_bytes("a.txt", "a.txt"), "member 'a.txt' appears twice"),
    "returning key": (tar_bytes("a.txt", "b.txt", "a.png"), "key 'a' reappears after another key"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_no_sound_shard_is_refused(tmp_path, case):
    content, message = DAMAGED[case]
    shard = tmp_path / "x.tar"
    shard.write_bytes(content)
    said = refusal(index, [str(shard)])
    assert said.startswith(f"{shard}: ") and message in said
    assert not Path(index_path(str(shard))).exists()


def test_a_missing_index_names_the_command(make_shard):
    shard = make_shard({"a": {"txt": b"1"}}, indexed=False)
    assert refusal(read_header, shard) == f"{shard}.index.npz: no such index; run `spar-scale data index {shard}`"


@pytest.mark.parametrize("change", [b"", b"more"])
def test_a_stale_index_is_refused_with_both_sizes(make_shard, change):
    shard = Path(make_shard({"a": {"txt": b"1"}}))
    before = shard.stat().st_size
    shard.write_bytes(shard.read_bytes() + change if change else shard.read_bytes()[:-512])
    after = shard.stat().st_size
    expected = (
        f"{shard}: found {after} bytes, but its index was made for {before};"
        f" if the shard is right, run `spar-scale data index {shard}`"
    )
    assert refusal(read_header, str(shard)) == expected
    assert refusal(show, [str(shard)], 1, None) == expected


@pytest.mark.parametrize("content", [b"", b"not an npz", b"PK\x03\x04 broken"])
def test_a_damaged_index_is_refused(make_shard, content):
    shard = make_shard({"a": {"txt": b"1"}})
    Path(index_path(shard)).write_bytes(content)
    said = refusal(read_header, shard)
    assert said.startswith(f"{shard}.index.npz: not an index (") and said.endswith(f"data index {shard}`")


def test_flipped_bytes_in_an_index_are_refused(make_shard):
    shard = make_shard({f"{n:03d}": {"txt": b"1"} for n in range(50)})
    path = Path(index_path(shard))
    content = bytearray(path.read_bytes())
    middle = content.index(b"offset.npy") + 200
    content[middle] ^= 0xFF
    path.write_bytes(content)
    assert "not an index" in refusal(read_index, shard)


def test_an_index_never_runs_code(make_shard, tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    shard = make_shard({"a": {"txt": b"1"}})
    np.savez(index_path(shard), header=np.array([Trap()], dtype=object), allow_pickle=True)
    assert "not an index" in refusal(read_header, shard)
    assert not (tmp_path / "sprung").exists()


def test_an_index_of_another_version_is_refused(make_shard):
    shard = make_shard({"a": {"txt": b"1"}})
    with np.load(index_path(shard)) as arrays:
        content = dict(arrays)
    content["header"] = content["header"] + np.array([1, 0, 0])
    np.savez(index_path(shard), **content)
    assert f"version {VERSION + 1}, this program reads {VERSION}; run `spar-scale data index" in refusal(
        read_header, shard
    )


def test_an_index_that_lacks_a_column_is_refused(make_shard):
    shard = make_shard({"a": {"txt": b"1"}})
    with np.load(index_path(shard)) as arrays:
        content = {name: arrays[name] for name in arrays.files if name != "offset"}
    np.savez(index_path(shard), **content)
    assert "not an index (offset missing); run" in refusal(read_header, shard)


def changed(name: str, value, kind=None):
    """A change of one array of an index."""
    return lambda arrays: {**arrays, name: np.array(value, dtype=kind or arrays[name].dtype)}


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def sized(name: str, shape: tuple[int, ...]):
    """The bytes of an array whose header gives this shape and whose body is empty."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<i8", "fortran_order": False, "shape": shape})
    return lambda arrays: {**arrays, name: stream.getvalue()}


HUGE = 1 << 62
CRAFTED = {  # of a shard with the samples a {txt, png} and b {txt}: first 0 2 3, extension 0 1 0
    "no header": changed("header", []),
    "header of two": changed("header", [VERSION, 4096]),
    "header as text": changed("header", ["4096", "2"], "<U4"),
    "no samples": changed("header", [VERSION, 10240, 0]),
    "more samples than keys": changed("header", [VERSION, 10240, 3]),
    "huge number of samples": changed("header", [VERSION, 10240, HUGE]),
    "negative bytes of the tar": changed("header", [VERSION, -1, 2]),
    "keys of another index": changed("keys", list(b"a\0c")),
    "one key twice": lambda arrays: with_keys(arrays, b"a\0a"),
    "too many keys": lambda arrays: with_keys(arrays, b"a\0b\0c"),
    "hash that is no text": changed("keys_sha256", [255] * 64),
    "first is short": changed("first", [0, 3]),
    "first begins late": changed("first", [1, 2, 3]),
    "first ends early": changed("first", [0, 1, 2]),
    "first ends late": changed("first", [0, 2, HUGE]),
    "first falls": changed("first", [0, 4, 3]),
    "first is negative": changed("first", [0, -HUGE, 3]),
    "a sample without members": changed("first", [0, 0, 3]),
    "first in two dimensions": changed("first", [[0, 2, 3]]),
    "extension out of range": changed("extension", [0, 1, 2]),
    "extension negative": changed("extension", [0, -1, 0]),
    "one extension twice": changed("extension", [0, 0, 0]),
    "one name of an extension twice": changed("extensions", list(b"txt\0txt")),
    "fewer extensions": changed("extension", [0, 1]),
    "fewer checksums": changed("header_crc", [0, 1]),
    "offsets of other numbers": changed("offset", [512.0, 1536.0, 2560.0], "<f8"),
    "offset negative": changed("offset", [-512, 1536, 2560]),
    "offset in the first header": changed("offset", [511, 1536, 2560]),
    "offset behind the tar": changed("offset", [512, 1536, HUGE]),
    "size negative": changed("size", [1, -1, 1]),
    "size of all memory": changed("size", [1, HUGE, 1]),
    "size beyond the tar": changed("size", [1, 1, 10240]),
    "shape of all memory": sized("offset", (HUGE,)),
    "negative shape": sized("offset", (-1,)),
    "scalar": changed("offset", 512),
    "npy of nothing": lambda arrays: {**arrays, "offset": b""},
    "npy of text": lambda arrays: {**arrays, "offset": b"no npy"},
    "compressed zeros": lambda arrays: {**arrays, "offset": bytes(1 << 20), "compression": zipfile.ZIP_DEFLATED},
    "objects": changed("size", [1, None, 1], object),
}


def with_keys(arrays: dict, keys: bytes) -> dict:
    hashed = hashlib.sha256(keys).hexdigest().encode()
    return {**arrays, "keys": np.frombuffer(keys, np.uint8), "keys_sha256": np.frombuffer(hashed, np.uint8)}


@pytest.mark.parametrize("case", CRAFTED)
def test_an_index_whose_parts_do_not_fit_is_refused_in_one_sentence(make_shard, case):
    shard = make_shard({"a": {"txt": b"1", "png": b"2"}, "b": {"txt": b"3"}})
    with np.load(index_path(shard)) as arrays:
        content = CRAFTED[case](dict(arrays))
    with zipfile.ZipFile(index_path(shard), "w", content.pop("compression", zipfile.ZIP_STORED)) as archive:
        for name, array in content.items():
            archive.writestr(f"{name}.npy", array if isinstance(array, bytes) else npy(array))
    error = refusal(read_index, shard)
    assert error.startswith(f"{shard}.index.npz: not an index (") and "\n" not in error and len(error) < 600
    assert error.endswith(f"; run `spar-scale data index {shard}`")
    index([shard])
    assert read_index(shard).keys == ("a", "b")


def test_an_index_keeps_more_extensions_than_16_bits_count(make_shard):
    """Files named a.00001.png, a.00002.png, ... are one sample with an extension each."""
    shard = make_shard({"a": {"txt": b"1"}})
    found, number = index_shard(shard), 40_000
    columns = {name: np.repeat(getattr(found, name), number) for name in ("offset", "size", "header_crc")}
    extensions = tuple(f"{n:05d}.png" for n in range(number))
    column, first = np.arange(number, dtype=found.extension.dtype), np.array([0, number])
    write_index(shard, replace(found, extensions=extensions, extension=column, first=first, **columns))
    assert tuple(read_index(shard).members(0)) == extensions


def test_patterns_are_sorted_and_take_tars_only(tiny_world):
    names = [Path(path).name for path in expand_shards(f"{tiny_world}/scenes-*.tar")]
    assert names == [f"scenes-{n:05d}.tar" for n in range(4)]
    assert len(expand_shards([f"{tiny_world}/*.tar", f"{tiny_world}/edits-00000.tar"])) == 7


def test_a_pattern_without_match_says_what_is_there(tiny_world, tmp_path):
    said = refusal(expand_shards, f"{tiny_world}/scene-*.tar")
    assert said.startswith(f"{tiny_world}/scene-*.tar: no such shard; {tiny_world} holds edits-00000.tar, ")
    assert "and 2 more" in said and "did you mean 'scenes-" in said
    assert (
        refusal(expand_shards, f"{tmp_path}/x.tar") == f"{tmp_path}/x.tar: no such shard; {tmp_path} holds no .tar file"
    )
    assert "nowhere does not exist (put webdataset shards there;" in refusal(expand_shards, f"{tmp_path}/nowhere/*.tar")


def test_an_unreachable_url_is_named():
    assert "nosuch://x/*.tar: cannot be reached" in refusal(expand_shards, "nosuch://x/*.tar")


def test_a_full_disk_leaves_no_half_index(make_shard):
    import resource

    shard = make_shard({"a": {"txt": b"1"}}, indexed=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        said = refusal(index, [shard])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert said == f"{shard}.index.npz: cannot be written (File too large)"
    assert os.listdir(Path(shard).parent) == [Path(shard).name]


@pytest.mark.parametrize("other", [{"b": {"txt": b"1"}}, {"a": {"txt": b"22"}}])
def test_another_shard_of_the_same_size_is_not_taken_for_the_indexed_one(make_shard, other):
    shard = make_shard({"a": {"txt": b"1"}})
    table = read_index(shard).members(0)
    make_shard(other, indexed=False)
    assert read_header(shard).samples == 1
    said = refusal(read_member, shard, *table["txt"])
    assert said.startswith(f"{shard}: the member at byte 512 is not the one in its index; ")
