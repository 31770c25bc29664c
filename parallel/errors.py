"""`UserError`: the exception for errors whose cause the user can correct.

Every refusal (a bad recipe, a damaged shard, a checkpoint of another model, a full disk) is a `UserError`. The command
line prints its message without a traceback and exits with code 2. Any other exception that reaches the command line is
a defect of this program and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error of the input or environment. Its message names the place (dotted key or file), the rule and a remedy.

    `everywhere` means that every process of the run raises the same error, so only the first must print it.
    """

    def __init__(self, message: str, everywhere: bool = False):
        super().__init__(message)
        self.everywhere = everywhere


def nearest(given: str, allowed: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` with the entry of `allowed` that is most similar, or "" if none is similar."""
    match = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""
