"""Random access to webdataset tar shards: an index of each shard, and reads by offset.

webdataset itself streams a tar from its start and cannot resume exactly. Here a tar is scanned once with the standard
library (tar_scan.py) and then read at the indexed offsets, by `pread` or by range requests to any fsspec URL. The index
of `x.tar` is `x.tar.index.npz` beside it: plain arrays (never pickled), 24 bytes per member plus the keys, loaded when
a sample of the shard is first needed.

If the directory of the shards is not writable, the environment variable SPAR_INDEX_DIR can name another one. While it
is set, `data index` writes there, and an index there takes precedence over the one beside the shard.

The trade-off: a shard must be indexed before use, and again after a change. A shard whose size differs from the one in
its index is refused, and every read checks that the member is the indexed one.
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
VERSION = 2  # since 2: extensions in lower case, concatenated tars scanned to the end
COLUMNS = {"first": "<i8", "extension": "<i4", "offset": "<i8", "size": "<i8", "header_crc": "<u4"}
ARRAYS = {"header": "<i8", "keys_sha256": "|u1", "keys": "|u1", "extensions": "|u1", **COLUMNS}
_OTHER_DIRECTORY_HELPS = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)


@dataclass(frozen=True)
class ShardIndex:
    """The samples of a shard: `keys` in the tar's order and, for each key, its members by extension.

    Members `first[i]:first[i+1]` belong to sample i; `extension` holds indices into `extensions`; `offset` and `size`
    are bytes in the tar. `header_crc` is the CRC-32 of each member's tar header, which every read checks. `tar_bytes`
    is the size of the scanned tar. `left_out` lists the members that belong to no sample, by reason; it is not stored,
    so only `index_shard` fills it.
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
    """The part of an index that is read when a run starts."""

    samples: int
    tar_bytes: int
    keys_sha256: str


def index_path(shard: str) -> str:
    """Return the path of the index beside a shard."""
    return shard + SUFFIX


def separate_index_path(shard: str) -> str | None:
    """Return the path of a shard's index in SPAR_INDEX_DIR, or None if the variable is not set.

    The file name starts with the shard's name and has a hash of its full path, so shards with equal names do not
    collide.
    """
    folder = os.environ.get(INDEX_DIR)
    if not folder:
        return None
    if is_url(folder):
        raise UserError(f"{INDEX_DIR}: found {folder}, expected a local directory")
    full = shard if is_url(shard) else os.path.abspath(shard)
    name = full.rsplit("/", 1)[-1][:50]
    return os.path.join(folder, f"{name}-{hashlib.sha256(_encode(full)).hexdigest()[:12]}{SUFFIX}")


def find_index(shard: str) -> str:
    """Return the path of a shard's index. Raises UserError, with the command that writes one, if there is none."""
    for path in (separate_index_path(shard), index_path(shard)):
        if path is not None and exists(path):
            return path
    shard_bytes(shard)  # if the shard itself is missing, this raises the more helpful error
    raise UserError(f"{index_path(shard)}: no such index; {_remedy(shard)}")


def index_shard(shard: str) -> ShardIndex:
    """Scan a tar and return its index. Raises UserError if it is empty, truncated, compressed or not a tar."""
    tar_bytes = shard_bytes(shard)
    if tar_bytes == 0:
        raise UserError(f"{shard}: the file is empty; a shard is an uncompressed tar with at least one sample")
    with open_shard(shard) as stream:
        scan = scan_tar(shard, stream, tar_bytes)
    if not scan.keys:
        rule = "a sample is a member named KEY.EXTENSION"
        raise UserError(f"{shard}: the tar holds no sample; {rule}{scan.left_out.report()}")
    table = np.array(scan.rows, dtype=np.int64).reshape(-1, 5)
    first = np.searchsorted(table[:, 0], np.arange(len(scan.keys) + 1))
    values = zip(COLUMNS.items(), (first, *table.T[1:]), strict=True)
    columns: dict[str, Any] = {name: np.ascontiguousarray(value, dtype=kind) for (name, kind), value in values}
    return ShardIndex(tuple(scan.keys), tuple(scan.extensions), **columns, tar_bytes=tar_bytes, left_out=scan.left_out)


def write_index(shard: str, index: ShardIndex, path: str | None = None) -> str:
    """Write an index atomically to `path`, by default beside its shard; return the path.

    Raises UserError if it cannot be written; the message suggests SPAR_INDEX_DIR if another directory can help.
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
        if path == index_path(shard) and (
            is_url(path) or getattr(error.__cause__, "errno", None) in _OTHER_DIRECTORY_HELPS
        ):
            remedy = f"set {INDEX_DIR} to a writable directory, then run the same command"
            raise UserError(f"{error}; {remedy}") from error
        raise
    return path


def read_index(shard: str) -> ShardIndex:
    """Return the index of a shard. Raises UserError, with the command to run, if it is missing or damaged."""
    with _reading(shard) as array:
        header = _header(array)
        stored = array("keys").tobytes()
        if hashlib.sha256(stored).hexdigest() != header.keys_sha256:
            raise ValueError("its keys do not match their hash")
        keys, extensions = _texts(stored), _texts(array("extensions").tobytes())
        columns: dict[str, Any] = {name: array(name) for name in COLUMNS}
        index = ShardIndex(keys, extensions, **columns, tar_bytes=header.tar_bytes)
        _check(index, header.samples)
    return index


def read_header(shard: str) -> ShardHeader:
    """Return the header of a shard's index. Raises UserError if the shard has another size now."""
    with _reading(shard) as array:
        header = _header(array)
    check_fresh(shard, header.tar_bytes, shard_bytes(shard))
    return header


def check_fresh(shard: str, indexed_bytes: int, current_bytes: int) -> None:
    """Raise UserError unless the shard still has the size that was indexed."""
    if current_bytes != indexed_bytes:
        raise UserError(
            f"{shard}: found {current_bytes} bytes, but its index was made for {indexed_bytes};"
            f" if the shard is right, run `spar-scale data index {shard}`"
        )


def digest(shards: Iterable[str]) -> str:
    """Return the sha256 over names, sizes and keys of the shards, which checkpoints store to identify the data."""
    total = hashlib.sha256()
    for shard in shards:
        header = read_header(shard)
        total.update(_encode(f"{shard.rsplit('/', 1)[-1]}\0{header.tar_bytes}\0{header.keys_sha256}\n"))
    return total.hexdigest()


@contextmanager
def _reading(shard: str) -> Iterator[Callable[[str], np.ndarray]]:
    """Open a shard's index; yield a function that reads one of its arrays by name.

    Any fault of the file, which may hold arbitrary bytes, is raised as UserError with the command to run.
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
        raise UserError(f"{path}: version {error}, this program reads {VERSION}; {_remedy(shard)}") from None
    except Exception as error:  # zipfile and numpy raise many types for damaged bytes
        raise UserError(f"{path}: not an index ({error}); {_remedy(shard)}") from None


class _OtherVersion(Exception):
    """The index has another version; the message is its number."""


def _array(archive: zipfile.ZipFile, file_bytes: int, name: str) -> np.ndarray:
    """Return a one-dimensional array of the file. A damaged size cannot make it allocate more than the file's size."""
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
        raise ValueError(f"{name} has {len(body)} bytes of {kind} with shape {shape}, expected 1-d {ARRAYS[name]}")
    return np.frombuffer(body, kind)


def _header(array: Callable[[str], np.ndarray]) -> ShardHeader:
    header = array("header").tolist()
    if header and header[0] != VERSION:
        raise _OtherVersion(header[0])
    if len(header) != 3 or header[1] < 0 or header[2] < 1:
        raise ValueError(f"its header is {header[:3]}, expected version, bytes of the tar and number of samples")
    return ShardHeader(header[2], header[1], array("keys_sha256").tobytes().decode())


def _check(index: ShardIndex, samples: int) -> None:
    """Raise ValueError for an index with inconsistent arrays or with members outside the tar."""
    first, members, extensions = index.first, len(index.offset), len(index.extensions)
    if not len(index.keys) == len(set(index.keys)) == samples == len(first) - 1:
        raise ValueError(f"{len(set(index.keys))} keys and {len(first) - 1} rows for {samples} samples")
    if len(set(index.extensions)) != extensions:
        raise ValueError("an extension appears twice")
    if not len(index.extension) == len(index.size) == len(index.header_crc) == members:
        raise ValueError("its columns differ in length")
    if first[0] != 0 or first[-1] != members or (first[1:] <= first[:-1]).any():
        raise ValueError(f"first does not increase from 0 to {members}")
    if (index.extension < 0).any() or (index.extension >= extensions).any():
        raise ValueError(f"extension has an index outside the {extensions} extensions")
    outside = (index.offset < TAR_BLOCK) | (index.offset > index.tar_bytes) | (index.size < 0)
    if (outside | (index.size > index.tar_bytes - index.offset)).any():
        raise ValueError(f"a member is outside the {index.tar_bytes} bytes of the tar")
    places = np.repeat(np.arange(samples), np.diff(first)) * extensions + index.extension
    if len(np.unique(places)) != members:
        raise ValueError("an extension of a sample appears twice")


def _remedy(shard: str) -> str:
    return f"run `spar-scale data index {shard}`"


def _encode(text: str) -> bytes:
    """Encode a name; bytes of it that are not UTF-8 are surrogates in Python and keep their value."""
    return text.encode("utf-8", "surrogateescape")


def _bytes(content: bytes) -> np.ndarray:
    return np.frombuffer(content, dtype=np.uint8)


def _texts(content: bytes) -> tuple[str, ...]:
    return tuple(content.decode("utf-8", "surrogateescape").split("\0"))
