"""What a rehearsal has shown: a row for each phase and each use of the last run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from spar_scale.runs.curves import LOSS_RELATIVE, NORM_RELATIVE, Curve, distance
from spar_scale.runs.rehearsal.meter import Measured

HEAD = ("phase or command", "trained", "saved, killed, resumed", "exported", "seconds", "core-s", "GiB", "shown")


@dataclass
class Row:
    """One phase or command; `reached` is what has been done so far, and is shown if the next thing fails."""

    name: str
    trained: str = "no"
    resumed: str = ""
    exported: str = ""
    faults: list[str] = field(default_factory=lambda: ["not finished"])
    measured: Measured = field(default_factory=Measured)

    def compare(self, killed: Curve, resumed: Curve, saved: int, layouts: str, tasks: Mapping[str, int]) -> None:
        """Take the curves of the killed and of the resumed run, which was saved after step `saved`.

        `tasks`: task -> samples of it, where the phase has several.
        """
        losses = [loss for loss, _ in resumed]
        loss, norm = distance(resumed[saved:], killed[saved:])
        of = "".join(f", {number} {task}" for task, number in tasks.items())
        self.trained = f"{len(losses)} steps{of}, loss {losses[0]:.4f} to {losses[-1]:.4f}"
        self.resumed = f"step {saved}, {layouts}: {loss:.0e} in loss, {norm:.0e} in norm"
        self.faults = [f"no sample of {task}" for task, number in tasks.items() if number == 0]
        if not all(math.isfinite(value) for step in (*killed, *resumed) for value in step):
            self.faults.append("a loss or gradient is not finite")
        if len(set(losses)) == 1:
            self.faults.append("the loss does not change")
        if loss > LOSS_RELATIVE or norm > NORM_RELATIVE:
            self.faults.append(f"the resumed run differs (at most {LOSS_RELATIVE:.0e}, {NORM_RELATIVE:.0e})")

    def cells(self) -> tuple[str, ...]:
        """Return the cells of the row."""
        took = self.measured
        sizes = f"{took.wall_s:.0f}", f"{took.core_s:.0f}", f"{took.peak_bytes / 2**30:.1f}"
        return self.name, self.trained, self.resumed, self.exported, *sizes, "; ".join(self.faults) or "yes"


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a table in Markdown."""
    cells = [HEAD, ("---",) * len(HEAD), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
