"""What a person sees while a run goes on: a bar on a terminal, one plain line per log step otherwise."""

from __future__ import annotations

import logging
import sys
from typing import Any

log = logging.getLogger(__name__)


class Progress:
    """Reports the latest metrics of a run; silent on every rank but the first."""

    def __init__(self, title: str, first: int, steps: int, speaks: bool):
        self._steps, self._title = steps, title
        self._bar: Any = None
        self._speaks = speaks
        if speaks and sys.stderr.isatty():
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
        if self._bar is not None:
            self._bar.update(self._task, completed=line["step"], note=note)
        else:
            print(f"{self._title} step {line['step']}/{self._steps}  {note}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
