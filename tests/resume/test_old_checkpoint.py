"""A checkpoint of an earlier version of the program resumes with that version's numbers; a later one is refused."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest
from launching import WorldError, run_world
from tiny_runs import metrics

from parallel.checkpoint.manifest import read_manifest
from spar_scale.config.recipe import load_recipe
from spar_scale.data.commands import index
from spar_scale.models.presets import PRESETS, resized
from spar_scale.runs.curves import curve, distance
from spar_scale.runs.parity import MUON
from spar_scale.training.trainer import STATE_VERSION

VERSION_1 = Path(__file__).parent / "version_1" / "run.tar.xz"
CHECKPOINT, DONE, STEPS = "run/checkpoints/step-00000003", 3, 6
PRESETS["pico"] = resized(  # a few thousand weights: the fixture holds them five times
    PRESETS["tiny"],
    name="pico",
    vision={"width": 8, "layers": 1, "heads": 2, "mlp_width": 8, "output_width": 8},
    autoencoder={
        "channels": (4, 4, 4, 4), "latent_channels": 4, "encoder_layers": (0, 1, 1, 1), "decoder_layers": (0, 1, 1, 1),
    },
    tokenizer={"residual_blocks": 1, "pixel_layers": 1, "pixel_heads": 2},
    language={"width": 8, "layers": 4, "heads": 4, "key_value_heads": 2, "mlp_width": 8},
    conditioning={"sampled_states": 2, "connector_layers": 2},
    diffusion={
        "latent_channels": 4, "layers": 4, "heads": 2, "head_width": 4, "cross_heads": 2, "cross_head_width": 4,
        "caption_channels": 8, "align_hidden": 8,
    },
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with tarfile.open(VERSION_1) as archive:
        archive.extractall(tmp_path, filter="data")
    index([str(tmp_path / "data" / "scenes-*.tar")])
    return tmp_path


def resume(rank: int, world: int, folder: Path) -> None:
    """Train the recorded recipe to its end. Its paths are relative to `folder`."""
    from parallel.launch.world import stop
    from spar_scale.training.trainer import train

    os.chdir(folder)
    assert train(load_recipe(Path("run/recipe.yaml"))) == 0
    stop()


def test_a_checkpoint_of_version_1_resumes_with_the_numbers_of_the_program_that_wrote_it(folder: Path) -> None:
    assert read_manifest(folder / CHECKPOINT).state["version"] == 1
    run_world(1, resume, folder, initialise=False)
    found, expected = curve(folder / "run"), curve(folder / "whole")
    assert len(found) == STEPS and found[:DONE] == expected[:DONE]
    loss, norm = distance(found[DONE:], expected[DONE:])
    print(f"version 1 resumed: loss {loss:.1e}, norm of the update {norm:.1e}")
    assert loss <= MUON[0]
    assert norm <= MUON[1]
    for line, wanted in zip(metrics(folder / "run")[DONE:], metrics(folder / "whole")[DONE:], strict=True):
        assert line["lr"] == wanted["lr"]
        assert line["terms"] == pytest.approx(wanted["terms"], rel=1e-3, abs=1e-6)
    assert read_manifest(folder / "run/checkpoints/step-00000006").state["version"] == STATE_VERSION


def test_a_checkpoint_of_a_later_version_is_refused_with_advice(folder: Path) -> None:
    """Its tensors differ too, and still the version is what the message names."""
    manifest = read_manifest(folder / CHECKPOINT)
    manifest.state["version"] = STATE_VERSION + 1
    manifest.keys["of_a_later_version"] = manifest.keys.pop("discriminator.stem.bias")
    manifest.write(folder / CHECKPOINT)
    message = f"step-00000003: found state version {STATE_VERSION + 1}, expected 1 or 2; resume with the version of"
    with pytest.raises(WorldError, match=message):
        run_world(1, resume, folder, initialise=False)
    assert curve(folder / "run") == curve(folder / "whole")[:DONE]
