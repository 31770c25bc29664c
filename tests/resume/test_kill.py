"""SIGKILL at seeded moments, some of them inside a save: the run goes on and its curve is bit-equal.

One run is killed again and again: after each start it is let run to a seeded number of logged steps
and for a seeded while beyond (or until a save has begun), then killed without warning.
`SPAR_KILLS=20` makes it twenty kills, three of them inside a save; the suite does fewer. The joint phase
(two tasks, conditioning, alignment) and the adversarial one (a discriminator of its own) take part.
"""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import pytest
from launching import start_process
from nano import NANO
from tiny_parts import make_parts
from tiny_runs import consumed, make_data, phase_values, train_all

from spar_scale.runs.curves import curve

KILLS = int(os.environ.get("SPAR_KILLS", "3"))
STEPS_BETWEEN, DELAY_S, EVERY = 3, 0.2, 4
ADVERSARIAL = {"perceptual_weight": 0.5, "adversarial_weight": 0.5, "adversarial_start": 3}
PHASES = {
    "tokenizer/init": (KILLS, {}),
    "tokenizer/encoder": (max(2, KILLS // 4), {"objective": ADVERSARIAL}),
    "align/joint": (max(2, KILLS // 4), {}),
}
"""Phase -> kills, changes of its recipe."""


def whole_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def saving(run_dir: Path) -> bool:
    """Whether a save has written tensor bytes and has not yet been committed."""
    try:
        return any(file.stat().st_size for file in run_dir.glob("checkpoints/.tmp-*/*.distcp"))
    except FileNotFoundError:  # committed between the listing and the look
        return False


@pytest.mark.parametrize("phase", PHASES)
def test_killed_at_seeded_moments_the_curve_is_bit_equal(tmp_path: Path, phase: str) -> None:
    make_data(tmp_path / "data", edits=64)
    parts = make_parts(tmp_path / "parts", NANO)
    kills, changes = PHASES[phase]
    steps = 8 * kills + 10  # enough that no kill comes after the end, however fast a step is
    settings = {
        **changes,
        "train": {"steps": steps, "log_every": 1},
        "checkpoint": {"every": EVERY, "keep": 2},
        "data__workers": 1,
        "global_batch": 6,
        "data__task_block": 3,
        "parallel__micro_batch": 3,
    }
    whole, killed = (
        phase_values(tmp_path / name, phase, tmp_path / "data", parts, "nano", **settings)
        for name in ("whole", "killed")
    )
    process = start_process(train_all, 0, 1, [whole])
    process.join(300)
    assert process.exitcode == 0
    reference = curve(tmp_path / "whole")
    assert len(reference) == steps

    moments = random.Random(0)
    in_saves = max(1, 3 * kills // 20)
    plan = [kill < in_saves for kill in range(kills)]
    moments.shuffle(plan)
    inside = 0
    log = tmp_path / "killed" / "metrics.jsonl"
    while plan:
        in_save = plan.pop(0)
        process = start_process(train_all, 0, 1, [killed])
        target, delay_s = whole_lines(log) + moments.randint(1, STEPS_BETWEEN), moments.uniform(0, DELAY_S)
        while process.is_alive() and whole_lines(log) < target:
            time.sleep(0.002)
        if in_save:
            while process.is_alive() and not saving(tmp_path / "killed"):
                pass
        else:
            process.join(delay_s)
        assert process.is_alive(), "the run ended before its kill"
        process.kill()
        process.join()
        caught = bool(list((tmp_path / "killed").glob("checkpoints/.tmp-*")))
        inside += caught
        if in_save and not caught and len(plan) < kills:
            plan.append(True)  # the save was over sooner than the signal came: try another
    process = start_process(train_all, 0, 1, [killed])
    process.join(300)
    assert process.exitcode == 0
    assert inside >= in_saves
    assert curve(tmp_path / "killed") == reference
    assert consumed(tmp_path / "killed") == consumed(tmp_path / "whole") == list(range(6 * len(reference)))
    assert json.loads((tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == len(reference)
