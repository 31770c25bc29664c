"""A run on stored values is, bit for bit, the run that computes them; what does not fit is refused with the command.

The recipes are real ones of every phase that reads stored values, the shards a small world with a bad picture.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launching import run_world
from tiny_parts import make_parts
from tiny_runs import consumed, curve, make_data, phase_values, train_all

PHASES = ("bootstrap/diffusion", "align/connector", "align/joint")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoded")
    make_data(folder / "data", scenes=40, edits=24)
    make_parts(folder / "parts")
    return folder


def values_of(folder: Path, phase: str, name: str, **changes: Any) -> dict[str, Any]:
    parts = {part.name: str(part) for part in (folder / "parts").iterdir()}
    return phase_values(folder / name, phase, folder / "data", parts, parallel__micro_batch=3, **changes)


def encode_all(rank: int, world: int, recipes: list[dict[str, Any]]) -> list[str]:
    from spar_scale.recipe import Recipe
    from spar_scale.training.encode import encode

    return [encode(Recipe.model_validate_json(json.dumps(values))) for values in recipes]


@pytest.mark.parametrize("phase", PHASES)
def test_ten_steps_are_bit_equal(folder, phase):
    name = phase.replace("/", "_")
    stored = values_of(folder, phase, f"{name}_stored", data__encoded="../encoded_" + name)
    run_world(1, encode_all, [stored], initialise=False, timeout_s=250)
    run_world(1, train_all, [values_of(folder, phase, f"{name}_plain"), stored], initialise=False, timeout_s=250)
    assert curve(folder / f"{name}_stored") == curve(folder / f"{name}_plain")
    assert consumed(folder / f"{name}_stored") == consumed(folder / f"{name}_plain")
