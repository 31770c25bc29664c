"""One process per run directory: a second is refused, by name.

A POSIX record lock on `run_dir/lock`. The kernel releases it when the process ends, however it ends; forked
loader workers do not inherit it (a flock they would), so an orphaned worker cannot keep a dead run locked; it works
over NFS. Its price: closing any descriptor of the file in the holding process releases the lock, so nothing but this
class opens that file, and a second lock by the same process is refused here instead of by the kernel.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO

from parallel.errors import UserError

LOCK_FILE = "lock"
_held: dict[tuple[int, Path], RunLock] = {}  # by process: a fork inherits the dictionary, not the lock


class RunLock:
    """Holds a run directory from construction to `release` (or the end of a `with`).

    Raises UserError when another process holds it (with its pid, host and start) or the directory is unwritable.
    """

    def __init__(self, run_dir: Path) -> None:
        """Create the directory if need be, and lock it."""
        path = run_dir / LOCK_FILE
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._key = (os.getpid(), path.resolve())
            if self._key in _held:
                raise UserError(f"{run_dir}: in use by this very process; close the first run before the second")
            self._stream: IO[str] | None = path.open("a+")
        except OSError as error:
            raise UserError(
                f"{error.filename or run_dir}: {error.strerror}; run_dir must be a writable directory"
            ) from error
        try:
            fcntl.lockf(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(self._stream)
            self._stream.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise _in_use(run_dir, holder) from None
            raise UserError(f"{path}: cannot be locked ({error.strerror}); run_dir needs POSIX locks") from error
        _held[self._key] = self
        since = datetime.now(UTC).isoformat(timespec="seconds")
        self._stream.truncate(0)
        self._stream.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n")
        self._stream.flush()

    def release(self) -> None:
        """Let the directory go; doing so twice is harmless."""
        if self._stream is not None and self._key[0] == os.getpid():
            self._stream.close()
            _held.pop(self._key, None)
        self._stream = None

    def __enter__(self) -> RunLock:
        """Return the held lock."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release."""
        self.release()


def check_free(run_dir: Path) -> None:
    """Raise UserError where another process holds a run directory; its lock is tried and let go at once.

    Not for a process that holds the lock itself: closing the file would release it.
    """
    try:
        with (run_dir / LOCK_FILE).open() as stream:
            holder = _holder(stream)
            fcntl.lockf(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared, so that checks on several nodes do not meet
    except BlockingIOError:
        raise _in_use(run_dir, holder) from None
    except OSError:  # there is no lock yet, or the disk refuses it, which the check of the disk reports
        return


def _in_use(run_dir: Path, holder: str) -> UserError:
    return UserError(f"{run_dir}: in use by {holder}; stop it, or give this run another run_dir")


def _holder(stream: IO[str]) -> str:
    try:
        stream.seek(0)
        content = json.loads(stream.read())
        return f"process {content['pid']} on {content['host']} since {content['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
