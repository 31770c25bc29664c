"""Access to shards: local paths and fsspec URLs, glob patterns, positional reads.

Local files are read by `pread`, URLs (s3://, gs://, http://, ...) by range requests through fsspec. A failure here is a
system error, not a bad sample: it is raised as a UserError that names the file, and stops the run. Remote reads are
not retried beyond what the fsspec client does.
"""

from __future__ import annotations

import fnmatch
import io
import itertools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any
from zlib import crc32

from parallel.errors import UserError, nearest

TAR_BLOCK = 512  # bytes of a tar header, and the unit that data is padded to
READ_AHEAD = 4 << 20  # bytes per range request when a remote shard is read from start to end


class ShardReader:
    """An open shard. Reads are positional, so one reader may be shared by forked processes and threads."""

    def __init__(self, shard: str):
        self.shard = shard
        self._descriptor = -1
        if is_url(shard):
            self._filesystem, self._path = resolve_url(shard)
            self.size_bytes = shard_bytes(shard)
            return
        try:
            self._descriptor = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
            self.size_bytes = os.fstat(self._descriptor).st_size
        except OSError as error:
            raise UserError(f"{shard}: cannot be read ({error.strerror})") from None

    def read_member(self, offset: int, size: int, header_crc: int) -> bytes:
        """Return a member's data. Raises UserError if the tar header before it is not the one that was indexed."""
        data = self.read(offset - TAR_BLOCK, TAR_BLOCK + size)
        if crc32(data[:TAR_BLOCK]) != header_crc:
            raise UserError(
                f"{self.shard}: the member at byte {offset} is not the one in its index;"
                f" if the shard is right, run `spar-scale data index {self.shard}`"
            )
        return data[TAR_BLOCK:]

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`. Raises UserError with the shard's name if the read fails or ends early."""
        if self._descriptor < 0:
            data = remote(self.shard, lambda: self._filesystem.cat_file(self._path, start=offset, end=offset + size))
        else:
            try:
                data = os.pread(self._descriptor, size, offset)
                while len(data) < size and (more := os.pread(self._descriptor, size - len(data), offset + len(data))):
                    data += more
            except OSError as error:
                raise UserError(f"{self.shard}: reading {size} bytes at {offset} failed ({error.strerror})") from None
        if len(data) > size:
            raise UserError(f"{self.shard}: {_too_much(self.shard, size, len(data))}")
        if len(data) < size:
            raise UserError(f"{self.shard}: ends {size - len(data)} bytes before the end of a member in its index")
        return data

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()


class _RangeStream(io.RawIOBase):
    """A remote shard as a stream that can seek; every read is one range request."""

    def __init__(self, shard: str):
        self._reader, self._position = ShardReader(shard), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._reader.size_bytes}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._reader.size_bytes - self._position))
        if size:
            buffer[:size] = self._reader.read(self._position, size)
        self._position += size
        return size


def _too_much(shard: str, requested: int, received: int) -> str:
    mismatch = f"received {received} bytes, requested {requested}"
    if not shard.startswith(("http://", "https://")):
        return f"{mismatch}; copy the shards to a place that supports reading parts of a file"
    return (
        f"{mismatch}: this server does not support HTTP range requests; copy the shards to a disk or an object store,"
        " or use another server"
    )


def read_member(shard: str, offset: int, size: int, header_crc: int) -> bytes:
    """Read one member of a shard (path or URL) without keeping the shard open."""
    reader = ShardReader(shard)
    try:
        return reader.read_member(offset, size, header_crc)
    finally:
        reader.close()


def expand_shards(patterns: str | Iterable[str]) -> list[str]:
    """Return the shards that paths or patterns match, sorted.

    A pattern may contain `*`, `?`, `[...]`, `**`, `~` and, as in webdataset, braces (`x-{000..012}.tar`; each of these
    files must exist). A file or folder whose name contains such characters is found too. Raises UserError if a pattern
    matches nothing.
    """
    shards: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matches = _find(pattern)
        if not matches:
            raise UserError(f"{pattern}: {_why_none(pattern)}")
        shards += matches
    return sorted(set(shards))


def shard_bytes(shard: str) -> int:
    """Return the size of a shard in bytes."""
    if is_url(shard):
        filesystem, path = resolve_url(shard)
        size = remote(shard, lambda: filesystem.size(path))
        if size is None:
            raise UserError(f"{shard}: the server does not report the size of the file; copy the shards to a disk")
        return int(size)
    try:
        return os.stat(shard).st_size
    except (OSError, ValueError) as error:
        raise UserError(f"{shard}: cannot be read ({getattr(error, 'strerror', error)})") from None


def _find(pattern: str) -> list[str]:
    if matches := _glob(pattern):
        return matches
    if "{" not in pattern:
        return []
    from braceexpand import braceexpand  # a dependency of webdataset

    try:
        expanded = braceexpand(pattern, escape=False)
        first = next(expanded)
        return [] if first == pattern else expand_shards(itertools.chain([first], expanded))
    except ValueError as error:
        raise UserError(f"{pattern}: its braces are not closed ({error}); write it as x-{{000..012}}.tar") from None


def _glob(pattern: str) -> list[str]:
    if is_url(pattern):
        filesystem, path = resolve_url(pattern)
        return [filesystem.unstrip_protocol(match) for match in remote(pattern, lambda: filesystem.glob(path))]
    path = Path(os.path.expanduser(pattern))
    if not _has_marks(str(path)):
        return [os.path.expanduser(pattern)] if os.path.isfile(path) else []
    if path.is_absolute() and path.parts[1] == "**":
        raise UserError(f"{pattern}: searches the whole file system; name the folder that holds the shards")
    try:
        if _has_marks(str(path.parent)) and not os.path.isdir(path.parent):
            matches = [str(match) for match in Path(path.anchor).glob(str(path.relative_to(path.anchor)))]
        else:  # only the file name is a pattern: the folder's own name may contain `[` literally
            names = os.listdir(path.parent) if os.path.isdir(path.parent) else []
            names = [name for name in names if not name.startswith(".") and fnmatch.fnmatchcase(name, path.name)]
            matches = [str(path.parent / name) for name in names]
    except (OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"{pattern}: cannot be searched ({error})") from None
    return matches or ([str(path)] if os.path.isfile(path) else [])


def _has_marks(path: str) -> bool:
    return any(mark in path for mark in "*?[")


def _why_none(pattern: str) -> str:
    """Return why a pattern matches nothing, and which shards its folder holds instead."""
    if is_url(pattern):
        return "no such shard; the pattern matches nothing there"
    path = Path(os.path.expanduser(pattern))
    if os.path.isdir(path):
        tars = _tars(path)
        if not tars:
            return "is a folder without .tar files, expected shards"
        return f"is a folder, expected shards; did you mean {path}/*.tar? ({len(tars)} matching)"
    if not os.path.isdir(path.parent):
        if _has_marks(str(path.parent)):
            return "no such shard; the pattern matches nothing"
        make = "put webdataset shards there; `spar-scale data import` makes them, `data make` those of the miniature"
        return f"no such shard; the folder {path.parent} does not exist ({make})"
    tars = _tars(path.parent)
    if not tars:
        return f"no such shard; {path.parent} holds no .tar file"
    names = ", ".join(tars[:5]) + (f" and {len(tars) - 5} more" if len(tars) > 5 else "")
    return f"no such shard; {path.parent} holds {names}{nearest(path.name, tars)}"


def _tars(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if name.endswith(".tar") and not name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from None


def exists(path: str) -> bool:
    """Return whether a path or URL exists."""
    if not is_url(path):
        return os.path.exists(path)
    filesystem, inner = resolve_url(path)
    return bool(remote(path, lambda: filesystem.exists(inner)))


def open_shard(shard: str) -> IO[bytes]:
    """Open a path or URL as a seekable binary stream."""
    if is_url(shard):
        return io.BufferedReader(_RangeStream(shard), READ_AHEAD)
    try:
        return open(shard, "rb")
    except OSError as error:
        raise UserError(f"{shard}: cannot be read ({error.strerror})") from None


def is_url(path: str) -> bool:
    """Return whether a path is an fsspec URL."""
    return "://" in path


def resolve_url(url: str) -> tuple[Any, str]:
    """Return the fsspec filesystem of a URL and the path on it."""
    import fsspec  # imported here: it is slow to import and only URLs need it

    return remote(url, lambda: fsspec.core.url_to_fs(url))


def remote(url: str, action: Callable[[], Any], failure: str = "cannot be reached") -> Any:
    """Return the result of `action`. Raises UserError for any exception: each remote file system has its own types."""
    try:
        return action()
    except Exception as error:
        raise UserError(f"{url}: {failure} ({type(error).__name__}: {error})") from error
