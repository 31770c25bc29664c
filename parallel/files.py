"""Write files atomically: a reader sees the complete old content or the complete new content.

The content is written to a temporary name in the same directory, flushed to disk and renamed over the target; then the
directory is flushed. The cost is one fsync of the file and one of its directory, a few milliseconds on a local disk.

Renaming would replace anything with that name. A target that exists and is not a regular file (a device such as
/dev/null, a FIFO, a socket, a directory) is refused, because for root the rename would replace it by a file. A symbolic
link is followed: the file that it points to is replaced, and the link stays.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

from parallel.errors import UserError

_NAME_CHARACTERS = 50  # of the target's name in a temporary name: at most 200 bytes in UTF-8 of the 255 allowed
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}


def write_file(path: Path, content: bytes | str) -> None:
    """Replace the file `path` by `content` (text as UTF-8). Raises UserError with the path if that fails."""
    with replaced(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to. It replaces `path` when the block ends; after an exception it is removed.

    Raises UserError with `path` for a target that is not a regular file and for an OSError (which is its cause). Other
    exceptions of the block are not changed.
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


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory, which gets the name `path` when the block ends; after an exception it is removed.

    Raises UserError with `path` if there is something of that name, and for an OSError (which is its cause).
    """
    temporary = path.with_name(f".{path.name[:_NAME_CHARACTERS]}.{os.getpid()}.tmp")
    try:
        if os.path.lexists(path):
            raise UserError(f"{path}: exists; give the name of a new directory")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        mode = temporary.stat().st_mode & 0o666  # safetensors (0.8) writes files that only their owner may read
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(mode)
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
        temporary.rename(path)
        sync_directory(path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def regular_target(path: Path) -> Path:
    """Return the file that writing to `path` replaces, links resolved. Raises UserError if it is not a regular file."""
    try:
        target = Path(os.path.realpath(path))
        kind = stat.S_IFMT(target.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return target
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from error
    if kind != stat.S_IFREG:
        raise UserError(f"{path}: is {_KINDS.get(kind, 'not a regular file')} and is not replaced; give another file")
    return target


def remove_temporaries(path: Path) -> None:
    """Remove temporary files that killed writers of `path` left. Call it only while no process writes `path`."""
    for temporary in path.parent.glob(f".{path.name[:_NAME_CHARACTERS]}.*.tmp"):
        temporary.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
