"""Scan a tar for the samples of a webdataset shard, by webdataset's rule for the names of members.

The rule (webdataset 1.0.2, `base_plus_ext` and `group_by_keys`): the key of a member ends at the first dot of its base
name, the rest is the extension in lower case, and members of one key are consecutive. There are four differences:

- A file whose base name begins with a dot is left out. webdataset makes a sample of it if it is in a folder (macOS
  writes `d/._a.txt`, which gets the key `d/`).
- Sparse files are left out, because their bytes are not contiguous.
- A key that reappears after another key is refused. webdataset makes two samples of it.
- Concatenated tars (`cat a.tar b.tar`) are one shard. webdataset reads only the first.

Members that are left out are reported with their reason; webdataset skips them silently. About 10,000 members are
scanned per second.
"""

from __future__ import annotations

import re
import tarfile
from dataclasses import dataclass, field
from typing import IO
from zlib import crc32

from parallel.errors import UserError
from spar_scale.data.left_out import NAME_CHARACTERS, LeftOut, printable
from spar_scale.data.storage import TAR_BLOCK

Row = tuple[int, int, int, int, int]  # sample, extension, offset and size in bytes, CRC-32 of the header
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_META = re.compile(r"__[^/]*__($|/)")
_CHUNK = 1 << 20  # bytes that are searched at a time for a concatenated tar


@dataclass
class Scan:
    """The content of a tar: key -> sample number, extension -> number, one row per member, what is left out."""

    keys: dict[str, int] = field(default_factory=dict)
    extensions: dict[str, int] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)
    latest: dict[str, str] = field(default_factory=dict)
    """Members of the latest key: extension -> member name."""


def scan_tar(shard: str, stream: IO[bytes], tar_bytes: int) -> Scan:
    """Return the content of the tar or the concatenated tars in `stream`.

    `tar_bytes` is the total size, `shard` the name for messages. Raises UserError if the data is truncated, damaged,
    compressed or not a tar, if a key reappears after another key, or if a key has an extension twice.
    """
    scan = Scan()
    start: int | None = 0
    while start is not None:
        block = start // TAR_BLOCK * TAR_BLOCK
        end = _scan_archive(shard, stream, block, tar_bytes, scan)
        if start and end == block:
            raise UserError(
                f"{shard}: found bytes that are not a tar at byte {start} of {tar_bytes}, after the end of the archive;"
                " a shard must hold only tars; write it again"
            )
        _check_end(shard, stream, end, tar_bytes)
        start = _find_nonzero(stream, end + 2 * TAR_BLOCK)
    return scan


def _scan_archive(shard: str, stream: IO[bytes], start: int, tar_bytes: int, scan: Scan) -> int:
    """Add the members of the tar at byte `start` to `scan`; return the byte after the last member."""
    stream.seek(start)
    try:
        # An explicit encoding: the default depends on the locale, so keys would differ between machines.
        with tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            for member in tar:
                if member.size < 0:  # would move the scan backwards, into an endless loop
                    raise tarfile.ReadError(f"{_shown(member.name)} has {member.size} bytes")
                _add(shard, stream, member, scan)
                # tarfile (3.11) keeps every member object, which would take more memory than the index itself.
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
            return tar.offset
    except (tarfile.TarError, ValueError, OverflowError) as error:
        what = "is truncated or damaged" if scan.rows else "is not an uncompressed tar"
        raise UserError(f"{shard}: {what} ({error}); {tar_bytes} bytes found") from None
    except OSError as error:
        raise UserError(f"{shard}: cannot be read ({error.strerror})") from None


def _add(shard: str, stream: IO[bytes], member: tarfile.TarInfo, scan: Scan) -> None:
    if member.isdir():
        return
    parsed = _NAME.match(member.name)
    if reason := _why_left_out(member) or (None if parsed else "no extension"):
        scan.left_out.add(reason, member.name)
        return
    assert parsed is not None
    key, extension = parsed[1], parsed[2].lower()
    if key not in scan.keys:
        scan.latest.clear()
    elif scan.keys[key] != len(scan.keys) - 1:
        raise UserError(
            f"{shard}: key '{_shown(key)}' reappears after another key; the members of a sample must be consecutive"
        )
    if (other := scan.latest.get(extension)) is not None:
        raise UserError(f"{shard}: {_duplicate(other, member.name)}; each extension of a key must be unique")
    scan.latest[extension] = member.name
    sample = scan.keys.setdefault(key, len(scan.keys))
    column = scan.extensions.setdefault(extension, len(scan.extensions))
    stream.seek(member.offset_data - TAR_BLOCK)
    scan.rows.append((sample, column, member.offset_data, member.size, crc32(stream.read(TAR_BLOCK))))


def _duplicate(first: str, second: str) -> str:
    if first == second:
        return f"member '{_shown(first)}' appears twice"
    return f"members '{_shown(first)}' and '{_shown(second)}' have the same extension in lower case"


def _shown(name: str) -> str:
    return printable(name, NAME_CHARACTERS)


def _why_left_out(member: tarfile.TarInfo) -> str | None:
    if member.islnk() or member.issym():
        return "links"
    if member.issparse():
        return "sparse files"
    if not member.isreg():
        return "devices, FIFOs and unknown types"
    if _META.match(member.name):
        return "webdataset's metadata"
    if member.name.rsplit("/", 1)[-1].startswith("."):
        return "hidden files"
    return "a NUL in the name" if "\0" in member.name else None


def _check_end(shard: str, stream: IO[bytes], end: int, tar_bytes: int) -> None:
    """Raise UserError unless the archive ends with its end mark.

    tarfile (3.11) takes a truncation between members, or a damaged header, for the end of the archive.
    """
    stream.seek(end)
    mark = stream.read(2 * TAR_BLOCK)
    if len(mark) < 2 * TAR_BLOCK or any(mark):
        raise UserError(
            f"{shard}: is truncated or damaged at byte {end} of {tar_bytes}; a complete tar ends with two zero blocks"
        )


def _find_nonzero(stream: IO[bytes], start: int) -> int | None:
    """Return the position of the first non-zero byte from `start` on, or None if there is none."""
    stream.seek(start)
    while chunk := stream.read(_CHUNK):
        if rest := chunk.lstrip(b"\0"):
            return start + len(chunk) - len(rest)
        start += len(chunk)
    return None
