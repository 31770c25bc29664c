"""What finished steps have to tell, left on the device until it is asked for, then summed over the ranks and written.

Reading a number makes the host wait for the device, so steps are read in blocks: the curve has every step, and a step
waits for none of it. Lines go to `metrics.jsonl`, the samples that a step consumed or left out beside them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from parallel.optimizers import OPTIMIZERS
from parallel.topology import Topology
from parallel.zero.engine import StepRecord
from spar_scale.config.recipe import Recipe
from spar_scale.training.guards import BadSampleGuard
from spar_scale.training.tracking import RunLog


@dataclass
class FinishedStep:
    """A step whose numbers are still on the device."""

    step: int
    lr: float
    record: StepRecord
    samples: list[int]
    bad: list[dict[str, Any]]


class StepMetrics:
    """The steps of one run; `terms` are the stage's losses and their weights, `log` is rank 0's alone.

    Too many bad samples, or a step without a usable one, raise UserError in `write`. `doubt` says that this rank could
    use no sample of its last step: others may have.
    """

    def __init__(self, recipe: Recipe, terms: Mapping[str, float], topology: Topology, log: RunLog | None):
        self._terms, self._topology, self._log = terms, topology, log
        self._global_batch, self._norm_of = recipe.global_batch, OPTIMIZERS[recipe.optimizer.name].norm_of
        self._guard = BadSampleGuard(recipe.guards.max_bad_fraction)
        self._pending: list[FinishedStep] = []
        self._since = time.monotonic()
        self.doubt = False

    def add(self, step: FinishedStep) -> None:
        """Keep a step for the next `write`."""
        self._pending.append(step)
        self.doubt = len(step.bad) == len(step.samples) > 0

    def write(self) -> dict[str, Any]:
        """Bring the steps to the host, sum them over ranks, write them; return the last line. On all ranks at once.

        Where no step has been added since the last call nothing is written, and the line is empty.
        """
        if not self._pending:
            return {}
        local = torch.stack([step.record.terms for step in self._pending]).cpu()
        terms = self._topology.sum(local if self._topology.reports_metrics else torch.zeros_like(local))
        norms = torch.stack([step.record.grad_norm for step in self._pending]).cpu()
        counts = self._topology.tensor_rank == 0 and self._topology.stage == 0
        everyone = self._topology.gather([(step.samples, step.bad) if counts else ([], []) for step in self._pending])
        now = time.monotonic()
        rate = len(self._pending) * self._global_batch / (now - self._since)
        self._since = now
        line: dict[str, Any] = {}
        for index, step in enumerate(self._pending):
            samples = [number for rank in everyone for number in rank[index][0]]
            bad = sorted((entry for rank in everyone for entry in rank[index][1]), key=lambda entry: entry["sample"])
            sums = terms[index].tolist() if len(bad) < len(samples) else None
            line = self._line(step, sums, float(norms[index]), rate)
            if self._log is not None:
                self._log.metrics([line])
                self._log.samples(step.step, samples)
                self._log.bad_samples(step.step, bad)
            self._guard.observe(step.step, len(samples), bad)
        self._pending.clear()
        self.doubt = False
        return line

    def _line(self, step: FinishedStep, terms: list[float] | None, norm: float, rate: float) -> dict[str, Any]:
        """The line of a step; its losses are null where there are no `terms`, as no sample could be used."""
        values, loss = dict.fromkeys(self._terms), None
        if terms is not None:
            values = dict(zip(self._terms, terms, strict=True))
            loss = sum(weight * value for weight, value in zip(self._terms.values(), terms, strict=True))
        return {
            "step": step.step,
            "samples": step.step * self._global_batch,
            "loss": loss,
            "grad_norm": norm,
            "norm_of": self._norm_of,
            "lr": step.lr,
            "samples_per_s": round(rate, 2),
            "terms": values,
            "skipped": step.record.skipped,
            "time": round(time.time(), 3),
        }
