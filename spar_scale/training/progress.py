"""What a person sees while a run goes on: a bar on a terminal, one plain line per log step otherwise.

Where the run is part of a larger one, which shows all its parts, `progress_sent_to` hands the same over to that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Listener = Callable[[int, int, str], None]
"""Takes the steps done, the steps of the run, and the metrics as a line."""
_listener: Listener | None = None


@contextmanager
def progress_sent_to(listener: Listener) -> Iterator[None]:
    """Within it, runs of this process tell `listener` how far they are instead of showing it."""
    global _listener
    _listener = listener
    try:
        yield
    finally:
        _listener = None


class Progress:
    """Reports the latest metrics of a run; silent on every rank but the first."""

    def __init__(self, title: str, first: int, steps: int, speaks: bool):
        self._steps, self._title = steps, title
        self._bar: Any = None
        self._speaks = speaks
        if speaks and _listener is not None:
            _listener(first, steps, "")
        elif speaks and sys.stderr.isatty():
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
        if not self._speaks:
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
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
