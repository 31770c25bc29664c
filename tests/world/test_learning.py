"""Small trainings learn what they should: held-out scenes against a control, beyond three standard errors.

The language model answers better with the picture than blind; the diffusion transformer predicts better from
the right prompt than from its neighbour's; in the joint phase its features come nearer to the tokenizer's. The
world is the miniature's; only the steps are few, too few for routing and connector to pass a prompt on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from launching import run_world
from tiny_parts import make_parts
from tiny_runs import metrics, phase_values, train_all

HELD_OUT = 300
MLLM_STEPS, DIFFUSION_STEPS, JOINT_STEPS = 70, 60, 20
MUON = {"name": "muon", "muon_lr": 0.015, "lr": 1.5e-3, "warmup_steps": 5, "clip": 0, "ema_decay": 0.8}


def learn(rank: int, world: int, folder: str) -> dict[str, Any]:
    """Train three phases and measure each; the diffusion transformer reads a language model from the seed."""
    from spar_scale.data.shapes_world import World
    from spar_scale.data.shards import make_world
    from spar_scale.evaluation.held_out import difference, held_out_terms
    from spar_scale.evaluation.understanding import answers_right, held_out_questions
    from spar_scale.training.export import trained_forward

    root = Path(folder)
    data, parts = root / "data", make_parts(root / "parts")
    make_world(World(seed=5, scenes=3000, heldout=HELD_OUT, edits=400, per_shard=1000), data)

    def run(name: str, phase: str, steps: int, batch: int, **changes: Any) -> Path:
        values = phase_values(
            root / name, phase, data, parts, "tiny", train={"steps": steps, "log_every": steps}, optimizer=MUON,
            checkpoint={"every": steps}, global_batch=batch, data__task_block=batch // 2,
            parallel={"zero": 1, "micro_batch": batch // 2}, **changes,
        )  # fmt: skip
        train_all(rank, world, [values])
        return root / name

    measured: dict[str, Any] = {}
    mllm_run = run(
        "mllm",
        "bootstrap/mllm",
        MLLM_STEPS,
        32,
        data__sources=[{"name": "questions", "shards": str(data / "scenes-*.tar")}],
    )
    mllm, _ = trained_forward(mllm_run)
    questions = held_out_questions(str(data / "heldout-*.tar"), HELD_OUT, 32)
    seen, blind = (answers_right(mllm, features, questions) for features in (mllm.features, None))
    measured["questions"] = (float(seen.mean()), float(blind.mean()), difference(seen, blind))
    held_out = str(data / "heldout-*.tar")
    diffusion = run("diffusion", "bootstrap/diffusion", DIFFUSION_STEPS, 32)
    right, shuffled = (held_out_terms(diffusion, {"images": held_out}, HELD_OUT, wrong) for wrong in (False, True))
    measured["prompts"] = difference(shuffled["flow_matching"], right["flow_matching"])
    joint = run("joint", "align/joint", JOINT_STEPS, 32)
    aligned = held_out_terms(joint, {"generation": held_out}, HELD_OUT)["alignment"]
    measured["cosine"] = (-float(aligned.mean()), -metrics(joint)[0]["terms"]["alignment"])
    return measured


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("learning")
    return run_world(1, learn, str(folder), initialise=False, timeout_s=800)[0]


def test_questions_are_answered_better_with_the_picture_than_blind(measured: dict[str, Any]) -> None:
    seen, blind, (gain, error) = measured["questions"]
    print(f"questions answered right: {seen:.3f}, blind {blind:.3f}, difference {gain:.3f} +- {error:.3f}")
    assert gain > 3 * error


def test_the_right_prompt_predicts_better_than_a_neighbours(measured: dict[str, Any]) -> None:
    gap, error = measured["prompts"]
    print(f"flow matching with shuffled prompts is higher by {gap:.4f} +- {error:.4f}")
    assert gap > 3 * error


def test_the_diffusion_transformers_features_come_nearer_to_the_tokenizers(measured: dict[str, Any]) -> None:
    after, before = measured["cosine"]
    print(f"cosine of aligned features: {after:.3f} held-out, {before:.3f} at the first step")
    assert after > before + 0.1
