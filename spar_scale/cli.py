"""The command line: `spar-scale train | parity | plan | data | checkpoint | track | doctor | cluster | demo | evaluate
| report | ablate`, and of a trained run `generate | edit | routes | reconstruct | ask`.

Nothing heavy is imported until a command needs it, so `--help` and a refused recipe take a fraction
of a second where importing torch alone takes one. A refusal (`UserError`) is one message on stderr
and exit code 2; an interrupt is 130; everything else is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Sequence

from parallel.errors import UserError
from parallel.exit_codes import INTERRUPTED, REFUSED
from spar_scale.arguments import build_parser

# What the disk or its owner refuses; the person can mend it, so it is no defect of ours.
_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS})


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    strangers = rest
    if hasattr(arguments, "overrides"):  # argparse loses `a.b=c` behind an option
        arguments.overrides += [word for word in rest if _is_override(word)]
        strangers = [word for word in rest if not _is_override(word)]
    if strangers:
        parser.error(f"unknown argument: {strangers[0]}")
    _start_log()
    try:
        return arguments.run(arguments)
    except UserError as error:
        return _refuse(str(error), error.everywhere)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        return _refuse(f"{error.filename or 'disk'}: {error.strerror}", everywhere=False)
    except RuntimeError as error:
        if "torch" not in sys.modules:
            raise
        from spar_scale.data.loader import is_lost_worker, lost_worker

        if not is_lost_worker(error):
            raise
        return _refuse(lost_worker(error), everywhere=False)
    except KeyboardInterrupt:
        return INTERRUPTED


def _is_override(word: str) -> bool:
    return "=" in word and not word.startswith("-")


def _refuse(message: str, everywhere: bool) -> int:
    """Print a refusal: the first process in any case, another one only what it alone may have found."""
    rank = _rank()
    if rank == "0":
        print(f"error: {message}", file=sys.stderr)
    elif not everywhere and "torch" in sys.modules:  # before that every process reads the same files
        print(f"error (rank {rank}): {message}", file=sys.stderr)
    return REFUSED


def _start_log() -> None:
    """Log lines are plain text on stderr, from the first process of a launch only."""
    level = logging.INFO if _rank() == "0" else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s")


def _rank() -> str:
    return os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"


if __name__ == "__main__":
    sys.exit(main())
