"""The lock of a run directory: a second process is refused, with a message that names the first.

It is a POSIX record lock on `run_dir/lock`. The kernel releases it when the process ends for any reason. Forked loader
workers do not inherit it (unlike a flock), so an orphaned worker cannot keep a dead run locked. It works over NFS. The
trade-off: closing any descriptor of the file in the holding process releases the lock. So only this class opens the
file, and it refuses a second lock by the same process itself, because the kernel would not.
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
_held: dict[tuple[int, Path], RunLock] = {}  # keyed by pid too: a fork inherits the dictionary but not the lock


class RunLock:
    """Locks a run directory from construction until `release` (or the end of a `with` block).

    Raises UserError if another process holds the lock (with its pid, host and start) or the directory is not writable.
    """

    def __init__(self, run_dir: Path) -> None:
        """Create the directory if it does not exist, and lock it."""
        path = run_dir / LOCK_FILE
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._key = (os.getpid(), path.resolve())
            if self._key in _held:
                raise UserError(f"{run_dir}: in use by this process; close the first run before the second")
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
        """Release the lock; a second call does nothing."""
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
    """Raise UserError if another process holds the lock of a run directory; take and release it immediately.

    A process that holds the lock itself must not call this: closing the file would release its lock.
    """
    try:
        with (run_dir / LOCK_FILE).open() as stream:
            holder = _holder(stream)
            fcntl.lockf(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared, so that concurrent checks do not conflict
    except BlockingIOError:
        raise _in_use(run_dir, holder) from None
    except OSError:  # there is no lock file yet, or a disk error, which the disk check reports
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
