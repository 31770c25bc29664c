"""The command line: `spar-scale train | parity | plan | data | checkpoint | track | doctor | cluster | demo | rehearse
| evaluate | report | ablate`, and for a trained run `export | generate | edit | routes | reconstruct | ask`.

Slow imports happen only in the command that needs them, so `--help` and the error of a bad recipe take a fraction of a
second, while importing torch takes a second. A `UserError` is printed as one message on stderr with exit code 2; an
interrupt gives 130. Every other exception is a defect of this program and keeps its traceback.
"""

from __future__ import annotations

import argparse
import errno
import io
import logging
import sys
from collections.abc import Sequence

from parallel.errors import UserError
from parallel.launch.environment import read_environment
from parallel.launch.exit_codes import INTERRUPTED, REFUSED
from spar_scale.cli.arguments import build_parser

# Errors of the disk or its permissions. The user can correct them, so they are no defect of this program.
_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS})


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # printing a name outside the locale's encoding must not fail
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    unknown = rest
    if hasattr(arguments, "overrides"):  # argparse loses `a.b=c` after an option
        arguments.overrides += [word for word in rest if _is_override(word)]
        unknown = [word for word in rest if not _is_override(word)]
    if unknown:
        parser.error(f"unknown argument: {unknown[0]}")
    place = _place(arguments)
    _start_log(place)
    try:
        return arguments.run(arguments)
    except UserError as error:
        return _refuse(str(error), error.everywhere, place)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        return _refuse(f"{error.filename or 'disk'}: {error.strerror}", everywhere=False, place=place)
    except RuntimeError as error:
        if "torch" not in sys.modules:
            raise
        from spar_scale.data.loader import is_lost_worker, lost_worker_message

        if not is_lost_worker(error):
            raise
        return _refuse(lost_worker_message(error), everywhere=False, place=place)
    except KeyboardInterrupt:
        return INTERRUPTED


def _is_override(word: str) -> bool:
    return "=" in word and not word.startswith("-")


def _place(arguments: argparse.Namespace) -> tuple[int, int]:
    """Return (rank, local rank) of a command that a launcher starts once per rank, else (0, 0).

    Also (0, 0) if the environment is contradictory: then no process can rely on another to print the error.
    """
    if not arguments.started_per_rank or getattr(arguments, "recipe", "") is None:
        return 0, 0
    try:
        rank, _, local_rank = read_environment()
    except UserError:
        return 0, 0
    return rank, local_rank


def _refuse(message: str, everywhere: bool, place: tuple[int, int]) -> int:
    """Print an error; return the exit code. Rank 0 always prints, another rank only if rank 0 may not have the error.

    Before torch is imported, a process has only read files, which are the same for all ranks of a node. Then only the
    first rank of each node prints.
    """
    rank, local_rank = place
    if rank == 0:
        print(f"error: {message}", file=sys.stderr)
    elif not everywhere and ("torch" in sys.modules or local_rank == 0):
        print(f"error (rank {rank}): {message}", file=sys.stderr)
    return REFUSED


def _start_log(place: tuple[int, int]) -> None:
    """Write log lines as plain text to stderr; ranks other than 0 write only errors."""
    logging.basicConfig(level=logging.INFO if place[0] == 0 else logging.ERROR, format="%(message)s")


if __name__ == "__main__":
    sys.exit(main())
