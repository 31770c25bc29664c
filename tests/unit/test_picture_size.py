"""Pictures of another size than the preset's: the same weights, interpolated positions and teacher, decoder resized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import phase_values

from parallel.errors import UserError
from parallel.program import Subprogram
from spar_scale.config.recipe import Recipe
from spar_scale.models.initialise import initialise
from spar_scale.models.internvl.vision import normalise
from spar_scale.models.presets import PRESETS, resized
from spar_scale.stages import Stage, build, meta_stage
from spar_scale.stages.forward import Forward
from spar_scale.stages.parts import preset_of

UNEVEN = resized(PRESETS["tiny"], name="uneven", image_size=24, vision={"image_size": 24, "patch_size": 6, "layers": 1})
"""6 pixels a token and 8 a latent position, as 28 and 32 of the published: 4 x 4 tokens, 3 x 3 positions."""
NOWHERE = {part: f"nowhere/{part}" for part in ("mllm", "tokenizer", "diffusion", "pixel_autoencoder")}


@pytest.fixture(scope="module", autouse=True)
def uneven():
    PRESETS["uneven"] = UNEVEN
    yield
    del PRESETS["uneven"]


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = UNEVEN.autoencoder.build()
    initialise(model, seed=7)
    UNEVEN.autoencoder.save(model, directory := tmp_path_factory.mktemp("autoencoder"))
    return str(directory)


def recipe(phase: str, parts: dict[str, str], size: int | None = None) -> Recipe:
    sized = {} if size is None else {"model__image_size": size}
    values = phase_values(Path("nowhere"), phase, Path("nowhere"), parts, "uneven", **sized)
    return Recipe.model_validate_json(json.dumps(values))


def stage_at(autoencoder: str, size: int | None) -> tuple[Stage, Any]:
    made = recipe("tokenizer/init", {"pixel_autoencoder": autoencoder}, size)
    return build(made), preset_of(made)


def test_twice_the_size_has_the_same_weights_and_each_part_meets_its_own_grid(autoencoder: str):
    (small, _), (large, preset) = (stage_at(autoencoder, size) for size in (None, 48))
    weights = large.model.state_dict()
    assert {name: tensor.shape for name, tensor in weights.items()} == {
        name: tensor.shape for name, tensor in small.model.state_dict().items()
    }
    images = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    slots = Subprogram(
        large.layers, ("features", "pixel_latent", "teacher_latent", "reconstruction", "pixel_alignment")
    )({"images": images})
    model: Any = large.model
    tower, embeddings = model.vision_tower, model.vision_tower.embeddings
    # InternVL's own rule: bicubic interpolation of the 4 x 4 positions to 8 x 8, the class token's as it is.
    positions = embeddings.position_embeddings
    square = positions[:, 1:].unflatten(1, (4, 4)).movedim(-1, 1)
    wider = F.interpolate(square, size=(8, 8), mode="bicubic", align_corners=False).flatten(2).mT
    patches = F.conv2d(normalise(images), embeddings.patch_embeddings.projection.weight,
                       embeddings.patch_embeddings.projection.bias, stride=6).flatten(2).mT  # fmt: skip
    hidden = torch.cat([embeddings.cls_token.expand(2, -1, -1), patches], 1) + torch.cat([positions[:, :1], wider], 1)
    for block in tower.encoder.layer:
        hidden = block(hidden)
    torch.testing.assert_close(slots["features"], model.projector(tower.layernorm(hidden)[:, 1:]), rtol=1e-4, atol=1e-5)
    teacher = model.pixel_encoder(images * 2 - 1)
    assert teacher.shape[-2:] == (6, 6) and torch.equal(slots["teacher_latent"], teacher)
    upsampled = F.interpolate(teacher, size=(8, 8), mode="bilinear", align_corners=False).flatten(2).mT
    expected = (slots["pixel_latent"] - upsampled).square().mean((1, 2))
    torch.testing.assert_close(slots["pixel_alignment"], expected)
    assert large.sample.image_size == 48 and preset.grid == 8
    assert slots["reconstruction"].shape == (2, 3, 48, 48)
    assert Forward(large, preset).encode(images).shape == (2, 32, 8, 8)


@pytest.mark.parametrize(("size", "nearest"), [(32, 24), (37, 48), (3, 24)])
def test_a_size_that_is_not_whole_in_tokens_and_positions_is_refused(size: int, nearest: int):
    with pytest.raises(
        UserError, match=rf"model.image_size: found {size}, must be a multiple of 24: .*; nearest: {nearest}"
    ):
        meta_stage(recipe("tokenizer/init", NOWHERE, size))


def test_a_phase_with_a_size_of_its_own_has_no_key_for_it_and_the_published_sizes_fit():
    with pytest.raises(ValueError, match=r"model.image_size: found 48, but stage align does not read it"):
        recipe("align/joint", NOWHERE, 48)
    assert PRESETS["spar_1b"].at(224).grid == 8
    assert PRESETS["spar_1b"].at(448) is PRESETS["spar_1b"]


def test_the_autoencoder_of_phase_connector_gets_pictures_of_its_own_size():
    stages = {phase: meta_stage(recipe(phase, NOWHERE)) for phase in ("align/connector", "align/joint")}
    sizes = {phase: stage.sample.image_size for phase, stage in stages.items()}
    assert sizes == {"align/connector": 4 * 8, "align/joint": 24}
