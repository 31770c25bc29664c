"""Random access to webdataset tar shards: an index beside each shard, and reads by offset.

webdataset itself streams a tar from its start and cannot resume exactly; here a tar is scanned once
with the standard library (about 10,000 members per second) and read by `pread` at the offsets found,
or by ranges from any fsspec URL. The index of `x.tar` is `x.tar.index.npz`: plain arrays (never
pickled), 22 bytes per member plus the keys, loaded when a sample of the shard is first needed.

The trade-off: a shard must be indexed before use, and a changed shard must be indexed again. A shard
whose size is not the one in its index is refused, and every read checks that it finds the member it expects.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from zlib import crc32

import numpy as np

from parallel.errors import UserError
from parallel.files import write_file
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

SUFFIX = ".index.npz"
VERSION = 1
COLUMNS = ("first", "extension", "offset", "size", "header_crc")
_MEMBER = re.compile(r"^((?:.*/|)[^./][^./]*)\.([^/]+)$")  # webdataset's rule: the key ends at the first dot


@dataclass(frozen=True)
class ShardIndex:
    """What a shard holds: `keys` in the tar's order and, for each, its members by extension.

    Members `first[i]:first[i+1]` belong to sample i; `extension` points into `extensions`; `offset`
    and `size` are bytes in the tar. `header_crc` is the CRC-32 of each member's tar header, checked at
    every read. `tar_bytes` is the size of the tar that was scanned.
    """

    keys: tuple[str, ...]
    extensions: tuple[str, ...]
    first: np.ndarray
    extension: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    header_crc: np.ndarray
    tar_bytes: int

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
    """Return where the index of a shard lies."""
    return shard + SUFFIX


def index_shard(shard: str) -> ShardIndex:
    """Scan a tar and return its index. Raises UserError for what is empty, truncated, compressed or not a tar."""
    tar_bytes = shard_bytes(shard)
    if tar_bytes == 0:
        raise UserError(f"{shard}: the file is empty; a shard is an uncompressed tar with at least one sample")
    with open_shard(shard) as stream:
        index = _scan(shard, stream, tar_bytes)
    if not index.keys:
        raise UserError(f"{shard}: the tar holds no sample; a sample is a member named KEY.EXTENSION")
    return index


def write_index(shard: str, index: ShardIndex) -> str:
    """Write an index beside its shard, atomically; return its path."""
    keys = "\0".join(index.keys)
    arrays = {
        "header": np.array([VERSION, index.tar_bytes, len(index)], dtype=np.int64),
        "keys_sha256": _bytes(hashlib.sha256(keys.encode()).hexdigest()),
        "keys": _bytes(keys),
        "extensions": _bytes("\0".join(index.extensions)),
        **{name: getattr(index, name) for name in COLUMNS},
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    path = index_path(shard)
    if is_url(path):
        filesystem, inner = resolve_url(path)
        remote(path, lambda: filesystem.pipe_file(inner, buffer.getvalue()))
    else:
        write_file(Path(path), buffer.getvalue())
    return path


def read_index(shard: str) -> ShardIndex:
    """Return the index of a shard; a missing or damaged one is refused with the command that mends it."""
    with _reading(shard) as arrays:
        header = _header(shard, arrays)
        keys, extensions = (_text(arrays[name]) for name in ("keys", "extensions"))
        columns = {name: arrays[name] for name in COLUMNS}
    return ShardIndex(tuple(keys), tuple(extensions), **columns, tar_bytes=header.tar_bytes)


def read_header(shard: str) -> ShardHeader:
    """Return samples, size and keys' digest of a shard, checked against the shard's present size."""
    with _reading(shard) as arrays:
        header = _header(shard, arrays)
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
        total.update(f"{shard.rsplit('/', 1)[-1]}\0{header.tar_bytes}\0{header.keys_sha256}\n".encode())
    return total.hexdigest()


def _scan(shard: str, stream: IO[bytes], tar_bytes: int) -> ShardIndex:
    keys: dict[str, int] = {}
    extensions: dict[str, int] = {}
    rows: list[tuple[int, int, int, int, int]] = []
    end = 0
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                end = member.offset_data + (-(-member.size // TAR_BLOCK) * TAR_BLOCK if member.isreg() else 0)
                parsed = _MEMBER.match(member.name)
                if not member.isreg() or member.issparse() or parsed is None:
                    continue
                key, extension = parsed.groups()
                _check_order(shard, keys, key, extension, extensions, rows)
                sample = keys.setdefault(key, len(keys))
                column = extensions.setdefault(extension, len(extensions))
                stream.seek(member.offset_data - TAR_BLOCK)
                rows.append((sample, column, member.offset_data, member.size, crc32(stream.read(TAR_BLOCK))))
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue] (tarfile keeps every member)
    except tarfile.TarError as error:
        what = "is truncated or damaged" if rows else "is not an uncompressed tar"
        raise UserError(f"{shard}: {what} ({error}); {tar_bytes} bytes found") from None
    except OSError as error:
        raise UserError(f"{shard}: cannot be read ({error.strerror})") from None
    _check_end(shard, stream, end, tar_bytes)
    table = np.array(rows, dtype=np.int64).reshape(-1, 5)
    first = np.searchsorted(table[:, 0], np.arange(len(keys) + 1)).astype(np.int64)
    columns = table[:, 1].astype(np.int16), table[:, 2].copy(), table[:, 3].copy(), table[:, 4].astype(np.uint32)
    return ShardIndex(tuple(keys), tuple(extensions), first, *columns, tar_bytes)


def _check_order(
    shard: str, keys: dict[str, int], key: str, extension: str, extensions: dict[str, int], rows: list[tuple[int, ...]]
) -> None:
    """A key's members stand together and each extension once, as webdataset requires."""
    sample = keys.get(key)
    if sample is None:
        return
    if sample != len(keys) - 1:
        raise UserError(f"{shard}: key '{key}' comes back after another key; the members of a sample stand together")
    column = extensions.get(extension)
    for row in reversed(rows):
        if row[0] != sample:
            break
        if row[1] == column:
            raise UserError(f"{shard}: member '{key}.{extension}' appears twice; each extension of a key stands once")


def _check_end(shard: str, stream: IO[bytes], end: int, tar_bytes: int) -> None:
    """tarfile (3.11) takes a cut between members, or a damaged header, for the end of the archive."""
    stream.seek(end)
    mark = stream.read(2 * TAR_BLOCK)
    if len(mark) < 2 * TAR_BLOCK or any(mark):
        raise UserError(
            f"{shard}: is truncated or damaged at byte {end} of {tar_bytes}; a complete tar ends with two zero blocks"
        )


@contextmanager
def _reading(shard: str) -> Iterator[Any]:
    """Open the arrays of a shard's index; whatever is wrong with them is said with the command that mends it."""
    path = index_path(shard)
    mend = f"run `spar-scale data index {shard}`"
    if not exists(path):
        shard_bytes(shard)  # a missing shard is the first thing to say
        raise UserError(f"{path}: no such index; {mend}")
    try:
        source = io.BytesIO(ShardReader(path).read(0, shard_bytes(path))) if is_url(path) else path
        with np.load(source, allow_pickle=False) as arrays:
            yield arrays
    except (ValueError, LookupError, TypeError, AttributeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not an index ({error}); {mend}") from None


def _header(shard: str, arrays: Any) -> ShardHeader:
    version, tar_bytes, samples = (int(value) for value in arrays["header"])
    if version != VERSION:
        raise UserError(
            f"{index_path(shard)}: version {version}, this program reads {VERSION}; run `spar-scale data index {shard}`"
        )
    if missing := {"keys", "extensions", *COLUMNS} - set(arrays.files):
        raise ValueError(f"{', '.join(sorted(missing))} missing")
    return ShardHeader(samples, tar_bytes, _text(arrays["keys_sha256"])[0])


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8)


def _text(array: np.ndarray) -> list[str]:
    return array.tobytes().decode().split("\0")
