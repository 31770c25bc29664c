"""Show the progress of several concurrent steps and the remaining time of all.

On a terminal: a bar for the total and one for every running step. Otherwise: one plain line per log step.
"""

from __future__ import annotations

import sys
from typing import Any


class Board:
    """Shows steps by name on stderr; `tick` passes the completed share of the total and the remaining seconds."""

    def __init__(self):
        self._total, self._bars, self._tasks = "", None, {}
        if sys.stderr.isatty():
            self._bars = _bars()
            self._tasks: dict[str, Any] = {"": self._bars.add_task("[bold]all", total=1.0, note="")}
            self._bars.start()

    def begin(self, name: str) -> None:
        """Show that a step starts."""
        if self._bars is None:
            print(f"{name}: starts", file=sys.stderr, flush=True)
        else:
            self._tasks[name] = self._bars.add_task(name, total=None, note="")

    def show(self, name: str, done: int, steps: int, note: str) -> None:
        """Show how many of its training steps a running step has completed."""
        if self._bars is not None:
            self._bars.update(self._tasks[name], completed=done, total=steps, note=f"{done}/{steps}  {note}")
        elif note:
            print(f"{name} step {done}/{steps}  {note}  [{self._total}]", file=sys.stderr, flush=True)

    def write_line(self, name: str, text: str) -> None:
        """Show a line that a step printed."""
        if self._bars is None:
            print(f"{name}: {text}", file=sys.stderr, flush=True)
        else:
            self._bars.console.print(f"{name}: {text}", markup=False, highlight=False)

    def end(self, name: str) -> None:
        """Remove the bar of a step that has ended."""
        if self._bars is not None:
            self._bars.remove_task(self._tasks.pop(name))

    def tick(self, share: float, left_s: float) -> None:
        """Update the total."""
        self._total = f"{share:.0%} of all, {clock(left_s)} left"
        if self._bars is not None:
            self._bars.update(self._tasks[""], completed=share, note=f"{share:.0%}, {clock(left_s)} left")
            self._bars.refresh()

    def close(self) -> None:
        """Remove the bars from the terminal."""
        if self._bars is not None:
            self._bars.stop()


def clock(seconds: float) -> str:
    """Return seconds as text: "40 s", "12 min", "2 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _bars() -> Any:
    """Return bars without rich's refresh thread, because the process that shows them forks."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}", markup=False)
    return Progress(*columns, console=Console(stderr=True), auto_refresh=False)
