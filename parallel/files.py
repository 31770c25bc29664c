"""Write a file so that a reader sees the old content or the whole new one, and never a part of either.

The content goes to a temporary name in the same directory, is flushed to disk and renamed over the target, and the
directory is flushed. The price is one fsync of the file and one of its directory, a few milliseconds on a local disk.

Renaming replaces whatever has the name. A target that exists and is no regular file (a device such as /dev/null, a
FIFO, a socket, a directory) is refused, because as root the rename would put a file in its place. A symbolic link is
followed: the file it points to is replaced and the link stays.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

from parallel.errors import UserError

_NAME_CHARACTERS = 50  # of a target in a temporary name, which may have 255 bytes: 200 and the rest
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}


def write_file(path: Path, content: bytes | str) -> None:
    """Replace the file `path` by `content` (text as UTF-8). Raises UserError, naming the path, where it cannot."""
    with replaced(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; when the block ends it replaces `path`, after an exception it is removed.

    Raises UserError, naming `path`, for a target that is no regular file and for what the disk refuses (its OSError
    is the cause). Other exceptions of the block pass.
    """
    target = regular_target(path)
    temporary = target.with_name(f".{target.name[:_NAME_CHARACTERS]}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_directory(target.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def regular_target(path: Path) -> Path:
    """Return the file that writing to `path` replaces (links followed); UserError if something else has that name."""
    try:
        target = Path(os.path.realpath(path))
        kind = stat.S_IFMT(target.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return target
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from error
    if kind != stat.S_IFREG:
        raise UserError(f"{path}: is {_KINDS.get(kind, 'no regular file')} and is not replaced; name another file")
    return target


def remove_temporaries(path: Path) -> None:
    """Remove what processes that were killed while they wrote `path` left; only where nobody else writes it now."""
    for temporary in path.parent.glob(f".{path.name[:_NAME_CHARACTERS]}.*.tmp"):
        temporary.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
