"""Scan a tar for the samples of a webdataset shard, by webdataset's own rule on the names of members.

The rule (webdataset 1.0.2, `base_plus_ext` and `group_by_keys`): the key of a member ends at the first dot of its base
name, the rest is the extension in lower case, and members of one key stand together. Four things differ:

- A file whose base name begins with a dot is left out. webdataset makes a sample of it if it lies in a folder
  (`d/._a.txt`, as a Mac writes them, gets the key `d/`).
- Sparse files are left out, because their bytes do not stand in one piece.
- A key that comes back after another one is refused. webdataset makes two samples of it.
- Several tars one behind the other (`cat a.tar b.tar`) are one shard. webdataset reads the first of them only.

Members that are left out are counted by reason and named, as webdataset itself skips them in silence.
About 10,000 members are scanned per second.
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
_CHUNK = 1 << 20  # bytes that are searched at a time for another tar


@dataclass
class Scan:
    """What a tar holds: number of each key and of each extension, one row per member, what is left out."""

    keys: dict[str, int] = field(default_factory=dict)
    extensions: dict[str, int] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)
    latest: dict[str, str] = field(default_factory=dict)
    """Extension -> name of the member, of the latest key."""


def scan_tar(shard: str, stream: IO[bytes], tar_bytes: int) -> Scan:
    """Return what the tar or tars in `stream` hold (`tar_bytes` in all; `shard` is the name in messages).

    Raises UserError for what is truncated, damaged, compressed or no tar, for a key that comes back after another one
    and for an extension that a key has twice.
    """
    found = Scan()
    start: int | None = 0
    while start is not None:
        block = start // TAR_BLOCK * TAR_BLOCK
        end = _scan_archive(shard, stream, block, tar_bytes, found)
        if start and end == block:
            raise UserError(
                f"{shard}: found bytes that are no tar at byte {start} of {tar_bytes}, behind the end of the archive;"
                " a shard must hold nothing but tars; write it again"
            )
        _check_end(shard, stream, end, tar_bytes)
        start = _find_nonzero(stream, end + 2 * TAR_BLOCK)
    return found


def _scan_archive(shard: str, stream: IO[bytes], start: int, tar_bytes: int, found: Scan) -> int:
    """Add the members of the tar at byte `start`; return the byte behind the last of them."""
    stream.seek(start)
    try:
        # The names' encoding is given: by default it is the locale's, and keys would differ between machines.
        with tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            for member in tar:
                if member.size < 0:  # which would move the scan backwards
                    raise tarfile.ReadError(f"{_shown(member.name)} has {member.size} bytes")
                _add(shard, stream, member, found)
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue] (tarfile keeps every member)
            return tar.offset
    except (tarfile.TarError, ValueError, OverflowError) as error:
        what = "is truncated or damaged" if found.rows else "is not an uncompressed tar"
        raise UserError(f"{shard}: {what} ({error}); {tar_bytes} bytes found") from None
    except OSError as error:
        raise UserError(f"{shard}: cannot be read ({error.strerror})") from None


def _add(shard: str, stream: IO[bytes], member: tarfile.TarInfo, found: Scan) -> None:
    if member.isdir():
        return
    parsed = _NAME.match(member.name)
    if reason := _why_left_out(member) or (None if parsed else "no extension"):
        found.left_out.add(reason, member.name)
        return
    assert parsed is not None
    key, extension = parsed[1], parsed[2].lower()
    if key not in found.keys:
        found.latest.clear()
    elif found.keys[key] != len(found.keys) - 1:
        raise UserError(
            f"{shard}: key '{_shown(key)}' comes back after another key; the members of a sample stand together"
        )
    if (other := found.latest.get(extension)) is not None:
        raise UserError(f"{shard}: {_twice(other, member.name)}; each extension of a key appears once")
    found.latest[extension] = member.name
    sample = found.keys.setdefault(key, len(found.keys))
    column = found.extensions.setdefault(extension, len(found.extensions))
    stream.seek(member.offset_data - TAR_BLOCK)
    found.rows.append((sample, column, member.offset_data, member.size, crc32(stream.read(TAR_BLOCK))))


def _twice(first: str, second: str) -> str:
    if first == second:
        return f"member '{_shown(first)}' appears twice"
    return f"members '{_shown(first)}' and '{_shown(second)}' have one extension, which is read in lower case"


def _shown(name: str) -> str:
    return printable(name, NAME_CHARACTERS)


def _why_left_out(member: tarfile.TarInfo) -> str | None:
    if member.islnk() or member.issym():
        return "links"
    if member.issparse():  # its bytes do not stand in one piece
        return "sparse files"
    if not member.isreg():
        return "devices, FIFOs and unknown types"
    if _META.match(member.name):
        return "webdataset's metadata"
    if member.name.rsplit("/", 1)[-1].startswith("."):
        return "hidden files"
    return "a NUL in the name" if "\0" in member.name else None


def _check_end(shard: str, stream: IO[bytes], end: int, tar_bytes: int) -> None:
    """tarfile (3.11) takes a cut between members, or a damaged header, for the end of the archive."""
    stream.seek(end)
    mark = stream.read(2 * TAR_BLOCK)
    if len(mark) < 2 * TAR_BLOCK or any(mark):
        raise UserError(
            f"{shard}: is truncated or damaged at byte {end} of {tar_bytes}; a complete tar ends with two zero blocks"
        )


def _find_nonzero(stream: IO[bytes], start: int) -> int | None:
    """Return where the first byte stands that is not zero, from `start` on; None where there is none."""
    stream.seek(start)
    while chunk := stream.read(_CHUNK):
        if rest := chunk.lstrip(b"\0"):
            return start + len(chunk) - len(rest)
        start += len(chunk)
    return None
