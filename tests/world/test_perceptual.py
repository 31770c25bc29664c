"""LPIPS in training: one curve with data-parallel ranks and in a pipeline, and a resume refuses other networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import WorldError, run_world
from nano import NANO
from tiny_parts import make_parts
from tiny_runs import make_data, metrics, phase_values, train_all

from spar_scale.files.random_weights import PERCEPTUAL_FILES, perceptual_networks, write_perceptual
from spar_scale.runs.curves import LOSS_RELATIVE, NORM_RELATIVE, curve, distance

LAYOUTS = {"serial": (1, 1, 1), "data": (2, 3, 1), "pipeline": (2, 1, 2)}
"""Run -> (processes, ZeRO stage, pipeline stages)."""


def values(folder: Path, name: str) -> dict:
    _, zero, pipeline = LAYOUTS[name]
    return phase_values(
        folder / name,
        "tokenizer/init",
        folder / "data",
        {"pixel_autoencoder": str(folder / "parts" / "pixel_autoencoder")},
        "nano",
        model__pretrained__perceptual=str(folder / "files"),
        objective={"perceptual": "lpips", "perceptual_weight": 1.0},
        global_batch=4,
        data__task_block=4,
        train={"steps": 3},
        checkpoint={"every": 3},
        parallel={"zero": zero, "pipeline": pipeline, "micro_batch": 2},
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("perceptual")
    make_data(folder / "data", scenes=16)
    make_parts(folder / "parts", NANO)
    write_perceptual(folder / "files", perceptual_networks(convnext=False))
    run_world(1, train_all, [values(folder, "serial")], initialise=False)
    run_world(2, train_all, [values(folder, name) for name in ("data", "pipeline")], initialise=False)
    return folder


@pytest.mark.parametrize("name", ["data", "pipeline"])
def test_the_perceptual_loss_is_the_same_under_every_layout(runs: Path, name: str) -> None:
    loss, norm = distance(curve(runs / name), curve(runs / "serial"))
    print(f"{name}: loss {loss:.1e}, gradient norm {norm:.1e}")
    assert loss <= LOSS_RELATIVE
    assert norm <= NORM_RELATIVE
    assert all(line["terms"]["perceptual"] > 0 for line in metrics(runs / name))


def test_a_run_does_not_go_on_with_other_networks(runs: Path) -> None:
    heads = runs / "files" / PERCEPTUAL_FILES["lpips"]
    torch.save({name: 2 * weight for name, weight in torch.load(heads, weights_only=True).items()}, heads)
    with pytest.raises(WorldError, match="the frozen part 'lpips' differs from the one that this run trained with"):
        run_world(1, train_all, [values(runs, "serial")], initialise=False)
