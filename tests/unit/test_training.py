"""Schedule, guards, logs and parameter groups on small numbers worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from parallel.errors import UserError
from parallel.optimizers import OPTIMIZERS
from spar_scale.config.recipe import OptimizerConfig
from spar_scale.config.schedule import learning_rate
from spar_scale.data.spec import SampleSpec
from spar_scale.stages import Stage
from spar_scale.training.guards import BadSampleGuard, NonFiniteGuard
from spar_scale.training.optimizers import parameter_groups
from spar_scale.training.tracking import RunLog, ranges, read_lines


@pytest.mark.parametrize(
    ("schedule", "step", "rate"),
    [
        ("cosine", 1, 0.25),
        ("cosine", 4, 1.0),
        ("cosine", 8, 0.2 + 0.8 * 0.5),
        ("cosine", 12, 0.2),
        ("linear", 6, 0.2 + 0.8 * 0.75),
        ("linear", 12, 0.2),
        ("constant", 12, 1.0),
        ("wsd", 8, 1.0),
        ("wsd", 10, 0.2 + 0.8 * 0.5),
        ("wsd", 12, 0.2),
    ],
)
def test_the_rate_rises_over_the_warm_up_and_falls_by_its_schedule(schedule: str, step: int, rate: float) -> None:
    settings = OptimizerConfig(lr=1.0, min_lr=0.2, warmup_steps=4, schedule=schedule)  # type: ignore[arg-type]
    assert learning_rate(settings, step, 12) == pytest.approx(rate)


def test_skipped_steps_in_a_row_stop_the_run_and_a_good_one_resets_them() -> None:
    guard = NonFiniteGuard(limit=2)
    for step, skipped in enumerate([True, True, False, True, True]):
        guard.observe(step, skipped)
    assert guard.state_dict() == {"version": 1, "total": 4, "in_a_row": 2}
    other = NonFiniteGuard(limit=2)
    other.load_state_dict(guard.state_dict())
    with pytest.raises(UserError, match=r"step 5: .* not finite for 3 steps in a row"):
        other.observe(5, True)
    with pytest.raises(UserError, match="version 7"):
        other.load_state_dict({"version": 7, "total": 0, "in_a_row": 0})


def test_a_few_bad_samples_are_counted_and_a_rising_share_stops_the_run() -> None:
    guard = BadSampleGuard(max_fraction=0.01)
    bad = [{"shard": "a.tar"}]
    guard.observe(1, 64, bad)  # 1 of 64: too few samples to judge
    for step in range(2, 12):
        guard.observe(step, 64, [])
    guard.observe(12, 64, bad)
    assert guard.total == 2
    with pytest.raises(UserError, match=r"a\.tar \(12\).*bad_samples\.jsonl"):
        guard.observe(13, 64, bad * 10)


def test_the_share_is_judged_before_there_are_many_samples() -> None:
    """A run of three steps does not end as trained on half of its samples."""
    bad = [{"shard": "a.tar"}]
    patient = BadSampleGuard(max_fraction=0.05)
    for step in range(1, 6):
        patient.observe(step, 2, bad)
    with pytest.raises(
        UserError, match=r"step 6: 6 of the last 12 samples .* = 0\.05 allows of 100; most are in a\.tar"
    ):
        patient.observe(6, 2, bad)


def test_bad_samples_of_long_ago_are_forgotten() -> None:
    guard = BadSampleGuard(max_fraction=0.01)
    guard.observe(1, 1000, [{"shard": "a.tar"}] * 10)
    guard.observe(2, 1000, [{"shard": "a.tar"}] * 10)
    assert guard.total == 20


def test_a_step_without_a_usable_sample_is_refused_with_the_first_reasons() -> None:
    guard = BadSampleGuard(max_fraction=1.0)
    bad = [{"shard": "a.tar", "key": str(number), "reason": "cut off"} for number in range(5)]
    guard.observe(1, 6, bad)
    guard.observe(2, 0, [])
    with pytest.raises(UserError, match=r"^step 3: none of its 5 samples could be used.*a\.tar: 0: cut off; a\.tar: 1"):
        guard.observe(3, 5, bad)


def test_sample_numbers_as_ranges_show_gaps_and_repeats() -> None:
    assert ranges([3, 1, 2, 7]) == [[1, 4], [7, 8]]
    assert ranges([1, 2, 2, 3]) == [[1, 3], [2, 4]]
    assert ranges([]) == []


def test_logs_are_cut_back_to_the_checkpoint_and_a_torn_line_goes(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log.metrics([{"step": step, "loss": step / 3} for step in (1, 2, 3)])
    for step in (1, 2, 3):
        log.samples(step, [step])
    log.bad_samples(3, [{"key": "k"}])
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    log = RunLog(tmp_path, 2)
    log.metrics([{"step": 3, "loss": math.nan}])
    log.close()
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert lines == [{"step": 1, "loss": 1 / 3}, {"step": 2, "loss": 2 / 3}, {"step": 3, "loss": None}]
    assert [line["step"] for line in read_lines(tmp_path / "samples.jsonl")] == [1, 2]
    assert read_lines(tmp_path / "bad_samples.jsonl") == []
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())


def stage() -> Stage:
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "stream": nn.Linear(2, 2), "frozen": nn.Linear(2, 2)})
    sample = SampleSpec(task="images", image_size=32)
    return Stage(model, [], (), {}, {"main": ("stream",), "encoder": ("encoder",)}, sample)


def test_groups_carry_their_multiplier_and_decay_only_matrices() -> None:
    settings = OptimizerConfig(lr=1e-3, weight_decay=0.1, groups={"encoder": 0.1})
    groups = {group["name"]: group for group in parameter_groups(stage(), settings)}
    assert set(groups) == {"main.decay", "main.plain", "encoder.decay", "encoder.plain"}
    assert groups["encoder.decay"]["multiplier"] == 0.1
    assert groups["main.decay"]["multiplier"] == 1.0
    assert groups["main.decay"]["weight_decay"] == 0.1
    assert groups["main.plain"]["weight_decay"] == 0.0
    assert [p.dim() for p in groups["main.plain"]["params"]] == [1]


def test_embeddings_do_not_decay() -> None:
    made = stage()
    made.model.get_submodule("encoder").add_module("embeddings", holder := nn.Module())
    for name in ("position_embeddings", "cls_token"):
        holder.register_parameter(name, nn.Parameter(torch.zeros(1, 3, 2)))
    groups = {group["name"]: group for group in parameter_groups(made, OptimizerConfig(lr=1e-3, weight_decay=0.1))}
    assert groups["encoder.plain"]["weight_decay"] == 0.0
    assert [p.dim() for p in groups["encoder.plain"]["params"]] == [1, 3, 3]


def test_muon_takes_the_matrices_at_its_own_rate() -> None:
    settings = OptimizerConfig(name="muon", lr=1e-3, muon_lr=1e-2, clip=0.0)
    groups = {group["name"]: group for group in parameter_groups(stage(), settings)}
    assert groups["main.muon"]["multiplier"] == pytest.approx(10.0)
    assert [p.dim() for p in groups["main.muon"]["params"]] == [2]
    assert not groups["main.plain"]["use_muon"]


def test_muon_leaves_embeddings_and_the_language_head_to_adamw() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(4, 2), "layer": nn.Conv2d(2, 2, 3), "lm_head": nn.Linear(2, 4)})
    built = Stage(model, [], (), {}, {"main": ("embed", "layer", "lm_head")}, SampleSpec(task="images", image_size=32))
    settings = OptimizerConfig(name="muon", lr=1e-3, clip=0.0)
    groups = {group["name"]: group for group in parameter_groups(built, settings)}
    assert [p.dim() for p in groups["main.muon"]["params"]] == [4]
    assert [p.dim() for p in groups["main.decay"]["params"]] == [2, 2]


def test_a_multiplier_of_no_group_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"optimizer\.groups\.encodr.*did you mean 'encoder'"):
        parameter_groups(stage(), OptimizerConfig(lr=1e-3, groups={"encodr": 0.1}))


@pytest.mark.parametrize(("name", "advice"), [("apex_adam", "another project"), ("deepspeed_adam", "CUDA")])
def test_a_fused_optimizer_that_is_not_here_is_refused_with_advice(name: str, advice: str) -> None:
    with pytest.raises(UserError, match=advice):
        OPTIMIZERS[name].build([])
