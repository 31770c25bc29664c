"""The command line: `spar-scale train | parity | plan | data | checkpoint | track | doctor | cluster | demo | evaluate
| report | ablate`, and of a trained run `generate | edit | routes | reconstruct | ask`.

Nothing heavy is imported until a command needs it, so `--help` and a refused recipe take a fraction
of a second where importing torch alone takes one. A refusal (`UserError`) is one message on stderr
and exit code 2; an interrupt is 130; everything else is a defect of ours and keeps its traceback.
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

# What the disk or its owner refuses; the person can mend it, so it is no defect of ours.
_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS})


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the locale cannot show is no traceback
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    strangers = rest
    if hasattr(arguments, "overrides"):  # argparse loses `a.b=c` behind an option
        arguments.overrides += [word for word in rest if _is_override(word)]
        strangers = [word for word in rest if not _is_override(word)]
    if strangers:
        parser.error(f"unknown argument: {strangers[0]}")
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
    """Return (rank, local rank) of a command that a launcher starts once for each rank, (0, 0) of any other.

    Where the environment contradicts itself no process can rely on another to print a refusal: (0, 0) too.
    """
    if not arguments.started_per_rank or getattr(arguments, "recipe", "") is None:
        return 0, 0
    try:
        rank, _, local_rank = read_environment()
    except UserError:
        return 0, 0
    return rank, local_rank


def _refuse(message: str, everywhere: bool, place: tuple[int, int]) -> int:
    """Print a refusal: rank 0 in any case, another rank unless rank 0 is sure to print the same.

    Before torch is imported a process has only read files, which are the same on all ranks of a node; so the first
    rank of each node prints.
    """
    rank, local_rank = place
    if rank == 0:
        print(f"error: {message}", file=sys.stderr)
    elif not everywhere and ("torch" in sys.modules or local_rank == 0):
        print(f"error (rank {rank}): {message}", file=sys.stderr)
    return REFUSED


def _start_log(place: tuple[int, int]) -> None:
    """Write log lines as plain text to stderr; ranks other than 0 write errors alone."""
    logging.basicConfig(level=logging.INFO if place[0] == 0 else logging.ERROR, format="%(message)s")


if __name__ == "__main__":
    sys.exit(main())
