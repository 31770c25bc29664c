"""Random access to webdataset tar shards: an index of each shard, and reads by offset.

webdataset itself streams a tar from its start and cannot resume exactly; here a tar is scanned once
with the standard library (tar_scan.py) and read by `pread` at the offsets found, or by ranges from any
fsspec URL. The index of `x.tar` is `x.tar.index.npz` beside it: plain arrays (never pickled), 24 bytes
per member plus the keys, loaded when a sample of the shard is first needed.

Where the directory of the shards cannot be written, the environment variable SPAR_INDEX_DIR names another one: while
it is set, `data index` writes there, and an index there is read before the one beside the shard.

The trade-off: a shard must be indexed before use, and a changed shard must be indexed again. A shard
whose size is not the one in its index is refused, and every read checks that it finds the member it expects.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from parallel.errors import UserError
from parallel.files import write_file
from spar_scale.data.left_out import LeftOut
from spar_scale.data.storage import (
    TAR_BLOCK,
    ShardReader,
    exists,
    is_url,
    open_shard,
    remote,
    resolve_url,
    shard_bytes,
)
from spar_scale.data.tar_scan import scan_tar

SUFFIX = ".index.npz"
INDEX_DIR = "SPAR_INDEX_DIR"
VERSION = 2  # 2: extensions in lower case, tars behind one another scanned to the end
COLUMNS = {"first": "<i8", "extension": "<i4", "offset": "<i8", "size": "<i8", "header_crc": "<u4"}
ARRAYS = {"header": "<i8", "keys_sha256": "|u1", "keys": "|u1", "extensions": "|u1", **COLUMNS}
_NO_PLACE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)  # another directory can help


@dataclass(frozen=True)
class ShardIndex:
    """What a shard holds: `keys` in the tar's order and, for each, its members by extension.

    Members `first[i]:first[i+1]` belong to sample i; `extension` points into `extensions`; `offset`
    and `size` are bytes in the tar. `header_crc` is the CRC-32 of each member's tar header, checked at
    every read. `tar_bytes` is the size of the tar that was scanned. `left_out` names, by reason, the members that are
    no sample; it is known after a scan alone and is not stored.
    """

    keys: tuple[str, ...]
    extensions: tuple[str, ...]
    first: np.ndarray
    extension: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    header_crc: np.ndarray
    tar_bytes: int
    left_out: LeftOut = field(default_factory=LeftOut)

    def __len__(self) -> int:
        return len(self.keys)

    def members(self, sample: int) -> dict[str, tuple[int, int, int]]:
        """Return {extension: (offset, size in bytes, CRC-32 of the header)} of a sample."""
        rows = slice(int(self.first[sample]), int(self.first[sample + 1]))
        names = (self.extensions[column] for column in self.extension[rows])
        places = zip(self.offset[rows].tolist(), self.size[rows].tolist(), self.header_crc[rows].tolist(), strict=True)
        return dict(zip(names, places, strict=True))


@dataclass(frozen=True)
class ShardHeader:
    """The few numbers of an index that are read when a run starts."""

    samples: int
    tar_bytes: int
    keys_sha256: str


def index_path(shard: str) -> str:
    """Return the path of the index beside a shard."""
    return shard + SUFFIX


def separate_index_path(shard: str) -> str | None:
    """Return the path of a shard's index in SPAR_INDEX_DIR, None where the variable is not set.

    The name has the beginning of the shard's and a hash of its full path, so shards of one name do not meet.
    """
    folder = os.environ.get(INDEX_DIR)
    if not folder:
        return None
    if is_url(folder):
        raise UserError(f"{INDEX_DIR}: found {folder}, must be a local directory")
    full = shard if is_url(shard) else os.path.abspath(shard)
    name = full.rsplit("/", 1)[-1][:50]
    return os.path.join(folder, f"{name}-{hashlib.sha256(_encode(full)).hexdigest()[:12]}{SUFFIX}")


def find_index(shard: str) -> str:
    """Return the path of the index that is read; UserError, with the command that makes it, where there is none."""
    for path in (separate_index_path(shard), index_path(shard)):
        if path is not None and exists(path):
            return path
    shard_bytes(shard)  # a missing shard is the first thing to say
    raise UserError(f"{index_path(shard)}: no such index; {_mend(shard)}")


def index_shard(shard: str) -> ShardIndex:
    """Scan a tar and return its index. Raises UserError for what is empty, truncated, compressed or not a tar."""
    tar_bytes = shard_bytes(shard)
    if tar_bytes == 0:
        raise UserError(f"{shard}: the file is empty; a shard is an uncompressed tar with at least one sample")
    with open_shard(shard) as stream:
        found = scan_tar(shard, stream, tar_bytes)
    if not found.keys:
        rule = "a sample is a member named KEY.EXTENSION"
        raise UserError(f"{shard}: the tar holds no sample; {rule}{found.left_out.report()}")
    table = np.array(found.rows, dtype=np.int64).reshape(-1, 5)
    first = np.searchsorted(table[:, 0], np.arange(len(found.keys) + 1))
    values = zip(COLUMNS.items(), (first, *table.T[1:]), strict=True)
    columns: dict[str, Any] = {name: np.ascontiguousarray(value, dtype=kind) for (name, kind), value in values}
    return ShardIndex(
        tuple(found.keys), tuple(found.extensions), **columns, tar_bytes=tar_bytes, left_out=found.left_out
    )


def write_index(shard: str, index: ShardIndex, path: str | None = None) -> str:
    """Write an index to `path`, by default beside its shard, atomically; return the path.

    Raises UserError where that cannot be written; it names SPAR_INDEX_DIR if another directory can help.
    """
    path, keys = path or index_path(shard), _encode("\0".join(index.keys))
    arrays = {
        "header": np.array([VERSION, index.tar_bytes, len(index)], dtype=np.int64),
        "keys_sha256": _bytes(hashlib.sha256(keys).hexdigest().encode()),
        "keys": _bytes(keys),
        "extensions": _bytes(_encode("\0".join(index.extensions))),
        **{name: getattr(index, name) for name in COLUMNS},
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    try:
        if is_url(path):
            filesystem, inner = resolve_url(path)
            remote(path, lambda: filesystem.pipe_file(inner, buffer.getvalue()), "cannot be written")
        else:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_file(Path(path), buffer.getvalue())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    except UserError as error:
        if path == index_path(shard) and (is_url(path) or getattr(error.__cause__, "errno", None) in _NO_PLACE):
            mend = f"set {INDEX_DIR} to a directory that can be written, then run the same command"
            raise UserError(f"{error}; {mend}") from error
        raise
    return path


def read_index(shard: str) -> ShardIndex:
    """Return the index of a shard; a missing or damaged one is refused with the command that mends it."""
    with _reading(shard) as array:
        header = _header(array)
        stored = array("keys").tobytes()
        if hashlib.sha256(stored).hexdigest() != header.keys_sha256:
            raise ValueError("its keys are not those that their hash was made of")
        keys, extensions = _texts(stored), _texts(array("extensions").tobytes())
        columns: dict[str, Any] = {name: array(name) for name in COLUMNS}
        index = ShardIndex(keys, extensions, **columns, tar_bytes=header.tar_bytes)
        _check(index, header.samples)
    return index


def read_header(shard: str) -> ShardHeader:
    """Return samples, size and keys' digest of a shard, checked against the shard's present size."""
    with _reading(shard) as array:
        header = _header(array)
    check_fresh(shard, header.tar_bytes, shard_bytes(shard))
    return header


def check_fresh(shard: str, indexed_bytes: int, found_bytes: int) -> None:
    """Raise UserError unless the shard has the size that its index was made from."""
    if found_bytes != indexed_bytes:
        raise UserError(
            f"{shard}: holds {found_bytes} bytes, but its index was made when it held {indexed_bytes};"
            f" if the shard is right, run `spar-scale data index {shard}`"
        )


def digest(shards: Iterable[str]) -> str:
    """Return the sha256 over names, sizes and keys of the shards: what a checkpoint says about its data."""
    total = hashlib.sha256()
    for shard in shards:
        header = read_header(shard)
        total.update(_encode(f"{shard.rsplit('/', 1)[-1]}\0{header.tar_bytes}\0{header.keys_sha256}\n"))
    return total.hexdigest()


@contextmanager
def _reading(shard: str) -> Iterator[Callable[[str], np.ndarray]]:
    """Open a shard's index; yield the function that reads an array of it by name.

    Whatever is wrong with it (the bytes may be of any program) is raised as UserError with the command that mends it.
    """
    path = find_index(shard)
    try:
        source = io.BytesIO(ShardReader(path).read(0, shard_bytes(path))) if is_url(path) else open(path, "rb")  # noqa: SIM115
        with source, zipfile.ZipFile(source) as archive:
            if missing := {f"{name}.npy" for name in ARRAYS} - set(archive.namelist()):
                raise ValueError(f"{', '.join(sorted(missing)).replace('.npy', '')} missing")
            yield partial(_array, archive, source.seek(0, os.SEEK_END))
    except UserError:
        raise
    except _OtherVersion as error:
        raise UserError(f"{path}: version {error}, this program reads {VERSION}; {_mend(shard)}") from None
    except Exception as error:
        raise UserError(f"{path}: not an index ({error}); {_mend(shard)}") from None


class _OtherVersion(Exception):
    """An index of another version, which is the message."""


def _array(archive: zipfile.ZipFile, file_bytes: int, name: str) -> np.ndarray:
    """Return a one-dimensional array of the file. Nothing is allocated that the file itself does not hold."""
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > file_bytes:
        raise ValueError(f"{name} is compressed or longer than the file")
    content = archive.read(info)
    stream = io.BytesIO(content)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError(f"{name} has another npy version than 1.0")
    shape, _, kind = np.lib.format.read_array_header_1_0(stream)
    body = content[stream.tell() :]
    if kind != np.dtype(ARRAYS[name]) or len(shape) != 1 or shape[0] * kind.itemsize != len(body):
        raise ValueError(f"{name} has {len(body)} bytes for {kind} of shape {shape}, must be {ARRAYS[name]} in one row")
    return np.frombuffer(body, kind)


def _header(array: Callable[[str], np.ndarray]) -> ShardHeader:
    header = array("header").tolist()
    if header and header[0] != VERSION:
        raise _OtherVersion(header[0])
    if len(header) != 3 or header[1] < 0 or header[2] < 1:
        raise ValueError(f"its header is {header[:3]}, must be version, bytes of the tar and number of samples")
    return ShardHeader(header[2], header[1], array("keys_sha256").tobytes().decode())


def _check(index: ShardIndex, samples: int) -> None:
    """Raise ValueError for an index whose parts do not fit together or point out of the tar."""
    first, members, extensions = index.first, len(index.offset), len(index.extensions)
    if not len(index.keys) == len(set(index.keys)) == samples == len(first) - 1:
        raise ValueError(f"{len(set(index.keys))} keys and {len(first) - 1} rows for {samples} samples")
    if len(set(index.extensions)) != extensions:
        raise ValueError("an extension appears twice")
    if not len(index.extension) == len(index.size) == len(index.header_crc) == members:
        raise ValueError("its columns differ in length")
    if first[0] != 0 or first[-1] != members or (first[1:] <= first[:-1]).any():
        raise ValueError(f"first does not rise from 0 to {members}")
    if (index.extension < 0).any() or (index.extension >= extensions).any():
        raise ValueError(f"extension points out of the {extensions} extensions")
    outside = (index.offset < TAR_BLOCK) | (index.offset > index.tar_bytes) | (index.size < 0)
    if (outside | (index.size > index.tar_bytes - index.offset)).any():
        raise ValueError(f"a member lies outside of the {index.tar_bytes} bytes of the tar")
    places = np.repeat(np.arange(samples), np.diff(first)) * extensions + index.extension
    if len(np.unique(places)) != members:
        raise ValueError("an extension of a sample appears twice")


def _mend(shard: str) -> str:
    return f"run `spar-scale data index {shard}`"


def _encode(text: str) -> bytes:
    """Names of tar members and files may hold bytes that are no UTF-8; they stand as surrogates and come back so."""
    return text.encode("utf-8", "surrogateescape")


def _bytes(content: bytes) -> np.ndarray:
    return np.frombuffer(content, dtype=np.uint8)


def _texts(content: bytes) -> tuple[str, ...]:
    return tuple(content.decode("utf-8", "surrogateescape").split("\0"))
