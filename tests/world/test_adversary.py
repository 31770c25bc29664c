"""The adversarial encoder phase: one curve under every layout, also after a resume; the discriminator's own state."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from launching import run_world
from nano import NANO
from tiny_parts import make_parts
from tiny_runs import make_data, metrics, phase_values, train_all

from spar_scale.runs.curves import LOSS_RELATIVE, NORM_RELATIVE, curve, distance

LAYOUTS = [(world, zero, 1, 1) for world in (1, 2, 4) for zero in (1, 2, 3)] + [(2, 1, 2, 1)]
LAYOUTS += [(2, 1, 1, 2), (4, 3, 1, 2), (4, 1, 2, 2)]
"""(processes, ZeRO stage, pipeline stages, tensor ranks)"""
SERIAL = "1-1-1-1"
START = 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adversary")
    make_data(folder / "data")
    parts = make_parts(folder / "parts", NANO)

    def values(name: str, world: int = 1, zero: int = 1, pipeline: int = 1, tensor: int = 1) -> dict:
        every = 5 if name == SERIAL else 10  # what `elastic` goes on from
        return phase_values(
            folder / name,
            "tokenizer/encoder",
            folder / "data",
            parts,
            "nano",
            init_from="../parent",
            objective={
                "perceptual_weight": 0.5,
                "semantic_distillation_weight": 1.0,
                "adversarial_weight": 0.1,
                "adversarial_start": START,
            },
            optimizer__lr=2e-4,  # slow, so that the kinks of the discriminator stay small beside the gradient
            optimizer__groups={"encoder": 0.1, "discriminator": 2.5},
            checkpoint={"every": every},
            parallel={"zero": zero, "pipeline": pipeline, "tensor": tensor, "micro_batch": 3},
        )

    parent = phase_values(
        folder / "parent", "tokenizer/init", folder / "data", parts, "nano", train={"steps": 2}, checkpoint={"every": 2}
    )
    for world in (1, 2, 4):
        recipes = [values("-".join(map(str, layout)), *layout) for layout in LAYOUTS if layout[0] == world]
        if world == 1:
            recipes.insert(0, parent)
        if world == 2:
            shutil.copytree(folder / SERIAL, folder / "elastic")
            shutil.rmtree(folder / "elastic" / "checkpoints" / "step-00000010")
            recipes.append(values("elastic", 2, 3))
        if world == 4:
            shutil.copytree(folder / "elastic", folder / "elastic-tensor")
            shutil.rmtree(folder / "elastic-tensor" / "checkpoints" / "step-00000010")
            recipes.append(values("elastic-tensor", 4, 1, 2, 2))
        run_world(world, train_all, recipes, initialise=False, timeout_s=600)
    return folder


def judged(run_dir: Path) -> list[tuple[float, float]]:
    """(generator's term, discriminator's loss) of every step."""
    return [(line["terms"]["adversarial"], line["terms"]["discriminator"]) for line in metrics(run_dir)]


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_the_adversarial_phase_is_the_same_under_every_layout(runs: Path, layout: tuple) -> None:
    name = "-".join(map(str, layout))
    loss, norm = distance(curve(runs / name), curve(runs / SERIAL))
    print(f"{name}: loss {loss:.1e}, gradient norm {norm:.1e}")
    assert loss <= LOSS_RELATIVE
    assert norm <= NORM_RELATIVE
    for found, wanted in zip(judged(runs / name), judged(runs / SERIAL), strict=True):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_the_discriminator_begins_at_its_step_and_learns(runs: Path) -> None:
    values = judged(runs / SERIAL)
    assert values[:START] == [(0.0, 0.0)] * START
    assert all(judge > 0 for _, judge in values[START:])
    assert values[-1][1] < values[START][1]


@pytest.mark.parametrize("name", ["elastic", "elastic-tensor"])
def test_a_resume_at_another_layout_keeps_the_discriminator(runs: Path, name: str) -> None:
    loss, norm = distance(curve(runs / name), curve(runs / SERIAL))
    assert loss <= LOSS_RELATIVE
    assert norm <= NORM_RELATIVE
    for found, wanted in zip(judged(runs / name), judged(runs / SERIAL), strict=True):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_the_phase_began_with_the_averaged_weights_of_its_parent(runs: Path) -> None:
    from parallel import checkpoint
    from parallel.checkpoint.manifest import references
    from spar_scale.training.export import recipe_of
    from spar_scale.training.parent import started_stage

    stage = started_stage(recipe_of(runs / SERIAL))
    average = checkpoint.read(runs / "parent" / "checkpoints" / "step-00000002", "ema")
    weights = dict(stage.model.named_parameters())
    assert average
    assert all(weights[name].equal(tensor) for name, tensor in average.items())
    assert references(runs / "parent" / "checkpoints" / "step-00000002")
