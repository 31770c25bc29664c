"""Guards that stop a run which no longer learns: too many non-finite updates, or too many bad samples.

Both use numbers that are equal on every rank, so all ranks stop at the same step.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

from parallel.errors import UserError

WINDOW_SAMPLES = 1000
"""The share of bad samples is computed over about this many of the latest samples."""
MINIMUM_SAMPLES = 100
"""Fewer samples are judged as so many with no further bad one: a bad file does not stop a run, and a run of only a few
steps is stopped as soon as a longer one would have to be."""
NAMED = 3
"""Number of bad samples that a message lists."""


class NonFiniteGuard:
    """Counts skipped updates; raises UserError if more than `limit` are consecutive."""

    def __init__(self, limit: int):
        self.limit = limit
        self.total = 0
        self.in_a_row = 0

    def observe(self, step: int, skipped: bool) -> None:
        """Count one step. Raises UserError above the limit."""
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if self.in_a_row > self.limit:
            raise UserError(
                f"step {step}: the loss or its gradient was not finite for {self.in_a_row} steps in a row "
                f"(guards.max_skipped_steps is {self.limit}); lower optimizer.lr or check the data of these steps",
                everywhere=True,
            )

    def state_dict(self) -> dict[str, int]:
        """Counts, for the checkpoint."""
        return {"version": 1, "total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the counts. Raises UserError for an unknown version."""
        if state.get("version") != 1:
            raise UserError(f"checkpoint: skipped-step counts of version {state.get('version')}, this program reads 1")
        self.total, self.in_a_row = state["total"], state["in_a_row"]


class BadSampleGuard:
    """Counts bad samples; raises UserError if their share of the latest samples exceeds `max_fraction`."""

    def __init__(self, max_fraction: float):
        self.max_fraction = max_fraction
        self.total = 0
        self._steps: deque[tuple[int, list[str]]] = deque()
        self._samples = 0

    def observe(self, step: int, samples: int, bad: Sequence[dict[str, Any]]) -> None:
        """Count the samples and bad samples of one step. Raises UserError above the share, or if all samples are bad.

        A bad sample has `shard`, `key` and `reason`; the message lists the first ones.
        """
        self.total += len(bad)
        if len(bad) == samples > 0:
            reasons = list(dict.fromkeys(f"{entry['shard']}: {entry['key']}: {entry['reason']}" for entry in bad))
            raise UserError(
                f"step {step}: none of its {samples} samples could be used, so it trained nothing: "
                f"{'; '.join(reasons[:NAMED])}. See bad_samples.jsonl, and correct data.sources",
                everywhere=True,
            )
        self._steps.append((samples, [str(entry["shard"]) for entry in bad]))
        self._samples += samples
        while self._samples - self._steps[0][0] >= WINDOW_SAMPLES:
            self._samples -= self._steps.popleft()[0]
        shards = Counter(shard for _, names in self._steps for shard in names)
        judged = max(self._samples, MINIMUM_SAMPLES)
        if shards.total() > self.max_fraction * judged:
            worst = ", ".join(f"{name} ({count})" for name, count in shards.most_common(NAMED))
            raise UserError(
                f"step {step}: {shards.total()} of the last {self._samples} samples could not be used, more than "
                f"guards.max_bad_fraction = {self.max_fraction:g} allows of {judged}; most are in {worst}; see "
                "bad_samples.jsonl",
                everywhere=True,
            )
