"""Metrics of finished steps: they stay on the device until `write`, which sums them over the ranks and logs them.

Reading a number makes the host wait for the device. So steps are read in blocks: the curve has every step, but no step
waits for the device. The lines go to `metrics.jsonl`, the sample numbers of each step and its bad samples to files
beside it.
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
    """A step whose metrics are still on the device."""

    step: int
    lr: float
    record: StepRecord
    samples: list[int]
    bad: list[dict[str, Any]]


class StepMetrics:
    """Collects the steps of one run. `terms` maps the training stage's losses to their weights; `log` is None except
    on rank 0.

    `write` raises UserError for too many bad samples, or a step without a good one. `all_bad` is true if this rank had
    only bad samples in its last step; other ranks may have had good ones.
    """

    def __init__(self, recipe: Recipe, terms: Mapping[str, float], topology: Topology, log: RunLog | None):
        self._terms, self._topology, self._log = terms, topology, log
        self._global_batch, self._norm_of = recipe.global_batch, OPTIMIZERS[recipe.optimizer.name].norm_of
        self._guard = BadSampleGuard(recipe.guards.max_bad_fraction)
        self._pending: list[FinishedStep] = []
        self._since = time.monotonic()
        self.all_bad = False

    def add(self, step: FinishedStep) -> None:
        """Keep a step for the next `write`."""
        self._pending.append(step)
        self.all_bad = len(step.bad) == len(step.samples) > 0

    def write(self) -> dict[str, Any]:
        """Copy the steps to the host, sum them over the ranks and write them; return the last line.

        A collective call of all ranks. If no step was added since the last call, it returns an empty line.
        """
        if not self._pending:
            return {}
        local = torch.stack([step.record.terms for step in self._pending]).cpu()
        terms = self._topology.sum(local if self._topology.reports_metrics else torch.zeros_like(local))
        norms = torch.stack([step.record.grad_norm for step in self._pending]).cpu()
        # Tensor-parallel and pipeline-parallel ranks share the samples of their data-parallel rank: count them once.
        counts = self._topology.tensor_rank == 0 and self._topology.pipeline_stage == 0
        by_rank = self._topology.gather([(step.samples, step.bad) if counts else ([], []) for step in self._pending])
        now = time.monotonic()
        rate = len(self._pending) * self._global_batch / (now - self._since)
        self._since = now
        line: dict[str, Any] = {}
        for index, step in enumerate(self._pending):
            samples = [number for rank in by_rank for number in rank[index][0]]
            bad = sorted((entry for rank in by_rank for entry in rank[index][1]), key=lambda entry: entry["sample"])
            sums = terms[index].tolist() if len(bad) < len(samples) else None
            line = self._line(step, sums, float(norms[index]), rate)
            if self._log is not None:
                self._log.metrics([line])
                self._log.samples(step.step, samples)
                self._log.bad_samples(step.step, bad)
            self._guard.observe(step.step, len(samples), bad)  # after the log, which then holds the reason
        self._pending.clear()
        self.all_bad = False
        return line

    def _line(self, step: FinishedStep, terms: list[float] | None, norm: float, rate: float) -> dict[str, Any]:
        """Return the line of a step; its losses are None if `terms` is None, because all samples were bad."""
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
