"""The one exception whose message is written for the person who can mend its cause.

Every refusal of the system (a bad recipe, a damaged shard, a checkpoint of another model, a full
disk) is a `UserError`. The command line prints it as one message without a traceback and exits
with code 2. Everything else that escapes is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A refusal: what was found (dotted key or file), the rule, and the nearest valid choice.

    `everywhere` says that every process of the run raises the same one, so only the first need tell.
    """

    def __init__(self, message: str, everywhere: bool = False):
        super().__init__(message)
        self.everywhere = everywhere


def nearest(given: str, allowed: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the closest of `allowed`, or an empty string."""
    match = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""
