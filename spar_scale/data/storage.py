"""Where shards lie: local paths and fsspec URLs, glob patterns, positional reads.

Local files are read by `pread`, URLs (s3://, gs://, http://, ...) by range requests through fsspec.
Whatever fails here is the system's fault and not a sample's: it is raised as a UserError that names
the file, and it stops the run. Remote reads are not retried beyond what the fsspec client does.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any
from zlib import crc32

from parallel.errors import UserError, nearest

TAR_BLOCK = 512  # bytes of a tar header, and the unit that data is padded to


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
        """Return a member's data; UserError where the tar header before it is not the one that was indexed."""
        data = self.read(offset - TAR_BLOCK, TAR_BLOCK + size)
        if crc32(data[:TAR_BLOCK]) != header_crc:
            raise UserError(
                f"{self.shard}: the member at byte {offset} is not the one its index lists;"
                f" if the shard is right, run `spar-scale data index {self.shard}`"
            )
        return data[TAR_BLOCK:]

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`; a read that fails or ends early raises UserError naming the shard."""
        if self._descriptor < 0:
            data = remote(self.shard, lambda: self._filesystem.cat_file(self._path, start=offset, end=offset + size))
        else:
            try:
                data = os.pread(self._descriptor, size, offset)
                while len(data) < size and (more := os.pread(self._descriptor, size - len(data), offset + len(data))):
                    data += more
            except OSError as error:
                raise UserError(f"{self.shard}: reading {size} bytes at {offset} failed ({error.strerror})") from None
        if len(data) != size:
            raise UserError(f"{self.shard}: ends {size - len(data)} bytes before a member that its index lists")
        return data

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()


def read_member(shard: str, offset: int, size: int, header_crc: int) -> bytes:
    """Read one member of a shard (path or URL) without keeping the shard open."""
    reader = ShardReader(shard)
    try:
        return reader.read_member(offset, size, header_crc)
    finally:
        reader.close()


def expand_shards(patterns: str | Sequence[str]) -> list[str]:
    """Return the shards that paths or glob patterns name, sorted; what matches nothing is refused."""
    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matches = _glob(pattern)
        if not matches:
            raise UserError(f"{pattern}: no such shard; {_neighbours(pattern)}")
        found += matches
    return sorted(set(found))


def shard_bytes(shard: str) -> int:
    """Return the size of a shard in bytes."""
    if is_url(shard):
        filesystem, path = resolve_url(shard)
        return int(remote(shard, lambda: filesystem.size(path)))
    try:
        return os.stat(shard).st_size
    except OSError as error:
        raise UserError(f"{shard}: cannot be read ({error.strerror})") from None


def _glob(pattern: str) -> list[str]:
    if is_url(pattern):
        filesystem, path = resolve_url(pattern)
        return [filesystem.unstrip_protocol(found) for found in remote(pattern, lambda: filesystem.glob(path))]
    if not any(mark in pattern for mark in "*?["):
        return [pattern] if os.path.isfile(pattern) else []
    folder = Path(pattern).parent
    if any(mark in str(folder) for mark in "*?["):
        return sorted(str(path) for path in Path(folder.anchor).glob(str(Path(pattern).relative_to(folder.anchor))))
    names = [name for name in os.listdir(folder) if not name.startswith(".")] if folder.is_dir() else []
    return [str(folder / name) for name in names if fnmatch.fnmatchcase(name, Path(pattern).name)]


def _neighbours(pattern: str) -> str:
    """Say what the pattern's folder holds instead."""
    if is_url(pattern):
        return "the pattern matches nothing there"
    path = Path(pattern)
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist (`spar-scale data make` writes the miniature world)"
    tars = sorted(entry.name for entry in path.parent.iterdir() if entry.name.endswith(".tar"))
    if not tars:
        return f"{path.parent} holds no .tar file"
    listed = ", ".join(tars[:5]) + (f" and {len(tars) - 5} more" if len(tars) > 5 else "")
    return f"{path.parent} holds {listed}{nearest(path.name, tars)}"


def exists(path: str) -> bool:
    """Return whether a path or URL exists."""
    if not is_url(path):
        return os.path.exists(path)
    filesystem, inner = resolve_url(path)
    return bool(remote(path, lambda: filesystem.exists(inner)))


def open_shard(shard: str) -> IO[bytes]:
    """Open a path or URL as a binary stream that can seek."""
    if is_url(shard):
        filesystem, path = resolve_url(shard)
        return remote(shard, lambda: filesystem.open(path, "rb"))
    try:
        return open(shard, "rb")
    except OSError as error:
        raise UserError(f"{shard}: cannot be read ({error.strerror})") from None


def is_url(path: str) -> bool:
    """Return whether a path is an fsspec URL."""
    return "://" in path


def resolve_url(url: str) -> tuple[Any, str]:
    """Return the fsspec filesystem of a URL and the path on it."""
    import fsspec  # heavy, and needed for URLs only

    return remote(url, lambda: fsspec.core.url_to_fs(url))


def remote(url: str, action: Callable[[], Any]) -> Any:
    """Remote filesystems raise exceptions of their own clients: whatever comes is a system error of this URL."""
    try:
        return action()
    except Exception as error:
        raise UserError(f"{url}: cannot be reached ({type(error).__name__}: {error})") from error
