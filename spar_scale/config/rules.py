"""The rules between the keys of a recipe: which combinations of values are refused, and why.

A rule looks up values by dotted key and yields a contradiction for each key that breaks it. The lookup of a key that is
invalid itself raises KeyError, which ends the rule, because that error is reported already.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from parallel.errors import nearest
from parallel.optimizers import OPTIMIZERS
from spar_scale.config.settings import Contradiction, Lookup, show
from spar_scale.phases import phases_by_stage


def _phase_belongs_to_stage(value: Lookup) -> Iterator[Contradiction]:
    stage, phase = value("stage"), value("phase")
    allowed = phases_by_stage()[stage]
    if phase not in allowed:
        yield "phase", f"found {show(phase)}, stage {stage} has {', '.join(allowed)}{nearest(phase, allowed)}"


def _pipeline_needs_zero_1(value: Lookup) -> Iterator[Contradiction]:
    pipeline, zero = value("parallel.pipeline"), value("parallel.zero")
    if pipeline > 1 and zero != 1:
        fits = f"parallel.pipeline={pipeline} parallel.zero=1 or parallel.pipeline=1 parallel.zero={zero}"
        found = f"found {zero} with parallel.pipeline {pipeline}"
        yield "parallel.zero", f"{found}, a pipeline needs ZeRO stage 1; nearest that fit: {fits}"


def _optimizer_demands(value: Lookup) -> Iterator[Contradiction]:
    name = value("optimizer.name")
    for demand in OPTIMIZERS[name].demands:
        if (found := value(demand.key)) != demand.value:
            fits = f"{demand.key}={demand.value} or optimizer.name=adamw {demand.key}={found}"
            broken = f"found {show(found)} with optimizer.name {name}, {demand.reason}"
            yield demand.key, f"{broken}; nearest that fit: {fits}"


def _rate_falls(value: Lookup) -> Iterator[Contradiction]:
    low, high = value("optimizer.min_lr"), value("optimizer.lr")
    if low > high:
        yield "optimizer.min_lr", f"found {show(low)}, must not be above optimizer.lr ({show(high)})"


def _discriminator_has_a_schedule(value: Lookup) -> Iterator[Contradiction]:
    low, high = value("discriminator.min_lr"), value("discriminator.lr")
    if high is not None and low > high:
        yield "discriminator.min_lr", f"found {show(low)}, must not be above discriminator.lr ({show(high)})"
    for key in ("min_lr", "warmup_steps") if high is None else ():
        if found := value(f"discriminator.{key}"):
            yield f"discriminator.{key}", f"found {show(found)}, but discriminator.lr is null; give it a rate"


def _block_fits_batch(value: Lookup) -> Iterator[Contradiction]:
    block, batch = value("data.task_block"), value("global_batch")
    if block > batch:
        yield "data.task_block", f"found {block}, must not be above global_batch ({batch})"


def _tracking_uri_is_an_address(value: Lookup) -> Iterator[Contradiction]:
    uri = value("tracking.uri")
    if uri is not None and not re.match(r"https?://[^/]|(sqlite|postgresql|mysql|mssql)(\+\w+)?://", uri):
        rule = "must be null, an MLflow server (http://host:5000) or its database (sqlite:///file, postgresql://...)"
        yield "tracking.uri", f"found {show(uri)}, {rule}"


def _perceptual_loss_counts(value: Lookup) -> Iterator[Contradiction]:
    kind = value("objective.perceptual")
    if kind != "gradient_difference" and value("objective.perceptual_weight") == 0:
        fits = "objective.perceptual_weight=1.0 or objective.perceptual=gradient_difference"
        yield "objective.perceptual_weight", f"found 0 with objective.perceptual {kind}; nearest that fit: {fits}"


RULES: tuple[Callable[[Lookup], Iterator[Contradiction]], ...] = (
    _phase_belongs_to_stage,
    _pipeline_needs_zero_1,
    _optimizer_demands,
    _rate_falls,
    _discriminator_has_a_schedule,
    _block_fits_batch,
    _tracking_uri_is_an_address,
    _perceptual_loss_counts,
)
