"""Show the progress of a run: a bar on a terminal, else one plain line per log step.

If the run is a step of a larger command that shows the progress of all its steps, `progress_sent_to` passes the
progress to that command instead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Listener = Callable[[int, int, str], None]
"""Called with the completed steps, all steps of the run, and a line of metrics."""
_listener: Listener | None = None


@contextmanager
def progress_sent_to(listener: Listener) -> Iterator[None]:
    """Within the context, runs of this process pass their progress to `listener` instead of showing it."""
    global _listener
    _listener = listener
    try:
        yield
    finally:
        _listener = None


class Progress:
    """Shows the latest metrics of a run, if `enabled` (on the first rank)."""

    def __init__(self, title: str, first: int, steps: int, enabled: bool):
        self._steps, self._title = steps, title
        self._bar: Any = None
        self._enabled = enabled
        if enabled and _listener is not None:
            _listener(first, steps, "")
        elif enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(title, total=steps, completed=first, note="")
            self._bar.start()

    def show(self, line: dict[str, Any]) -> None:
        """Show one line of metrics."""
        if not self._enabled:
            return
        terms = " ".join(f"{name} {value:.4f}" for name, value in line["terms"].items())
        note = f"loss {line['loss']:.4f} ({terms}) norm {line['grad_norm']:.3f} {line['samples_per_s']:.0f} samples/s"
        if _listener is not None:
            _listener(line["step"], self._steps, note)
        elif self._bar is not None:
            self._bar.update(self._task, completed=line["step"], note=note)
        else:
            print(f"{self._title} step {line['step']}/{self._steps}  {note}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self._bar is not None:
            self._bar.stop()
