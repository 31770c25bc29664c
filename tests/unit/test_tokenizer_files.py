"""Parts on disk: the tokenizer comes back as it was, scales are measured, and what does not fit is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_parts import make_parts
from tiny_runs import phase_values
from torch import Tensor, nn

from parallel.errors import UserError
from parallel.program import Subprogram
from spar_scale.config.recipe import Recipe
from spar_scale.models.dual_stream import Streams
from spar_scale.models.initialise import initialise
from spar_scale.models.internvl import save_mllm
from spar_scale.models.presets import PRESETS
from spar_scale.models.published import PretrainedPart
from spar_scale.stages import LatentScale, build
from spar_scale.stages.forward import Forward
from spar_scale.training.calibration import latent_scale

TINY: Any = PRESETS["tiny"]
STREAMS = ("dual", "semantic", "pixel")
TEACHERS = ("pixel_encoder.", "initial_encoder.")
LOADERS: dict[str, Callable[[PretrainedPart], Any]] = {
    "mllm": lambda part: TINY.language.load(part, TINY.vision),
    "diffusion": TINY.diffusion.load,
    "pixel_autoencoder": TINY.autoencoder.load,
}


def pictures(number: int = 6) -> Tensor:
    return torch.rand(number, 3, 32, 32, generator=torch.Generator().manual_seed(4))


def tokenizer_of(streams: Streams = "dual") -> Any:
    model = TINY.tokenizer.build(TINY.vision, TINY.autoencoder, streams, pixel_encoder=True, initial_encoder=True)
    initialise(model, seed=2)
    return model.eval()


def load_tokenizer(directory: Path) -> tuple[Any, float]:
    return TINY.tokenizer.load(PretrainedPart("tokenizer", directory, "tiny"), TINY.vision, TINY.autoencoder)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, str]:
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def part(parts, tmp_path):
    """Return a function that copies a part's directory, to be damaged."""

    def copy(name: str) -> Path:
        return shutil.copytree(parts[name], tmp_path / name)

    return copy


def encode(model: nn.Module, images: Tensor) -> Tensor:
    layers = [*TINY.vision.feature_layers(model, frozen=True), *TINY.tokenizer.latent_layers(model)]
    return Subprogram(layers, ("tokenizer_latent",))({"images": images})["tokenizer_latent"]


@pytest.mark.parametrize("streams", STREAMS)
def test_a_tokenizer_comes_back_bit_by_bit_without_its_teachers(tmp_path, streams):
    model = tokenizer_of(streams)
    TINY.tokenizer.save(model, tmp_path / "part", "tiny", 1.75, 6)
    loaded, scale = load_tokenizer(tmp_path / "part")
    kept = {name: weight for name, weight in model.state_dict().items() if not name.startswith(TEACHERS)}
    assert {name.split(".")[0] + "." for name in model.state_dict().keys() - kept.keys()} == set(TEACHERS)
    assert loaded.streams == streams and loaded.state_dict().keys() == kept.keys()
    assert all(torch.equal(weight, kept[name]) for name, weight in loaded.state_dict().items())
    assert scale == 1.75


@pytest.mark.parametrize("streams", STREAMS)
def test_a_phase_of_the_tokenizer_hands_on_the_scale_that_was_measured(parts, tmp_path, streams):
    values = phase_values(tmp_path, "tokenizer/encoder", tmp_path, parts, model__streams=streams)
    stage = build(Recipe.model_validate_json(json.dumps(values)))
    stage.model.eval()
    assert stage.export is not None and stage.export.calibrated
    latents = Forward(stage, TINY).encode(pictures())
    stage.export.write(stage, tmp_path / "part", LatentScale(latent_scale(latents), len(latents)))
    loaded, scale = load_tokenizer(tmp_path / "part")
    own = stage.model.state_dict()
    assert loaded.streams == streams and all(torch.equal(own[name], w) for name, w in loaded.state_dict().items())
    latents = torch.cat([encode(loaded, image[None]) for image in pictures()]).double()
    deviation = ((latents - latents.mean()) ** 2).sum().div(latents.numel() - 1).sqrt()
    assert scale == pytest.approx(1 / deviation.item(), rel=1e-4) and abs(scale - 1) > 0.1


def test_the_scale_is_the_inverse_deviation_over_all_elements():
    latents = torch.tensor([0.0, 2.0, 4.0, 6.0]).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    deviation = (20 * 12 / 47) ** 0.5  # squares 9 + 1 + 1 + 9 of twelve elements each, over 48 - 1
    assert latent_scale(latents) == pytest.approx(1 / deviation, rel=1e-6)


def test_an_autoencoder_hands_on_its_scale(tmp_path):
    model = TINY.autoencoder.build()
    initialise(model, seed=3)
    TINY.autoencoder.save(model, tmp_path, 2.75)
    loaded, scale = LOADERS["pixel_autoencoder"](PretrainedPart("pixel_autoencoder", tmp_path, "tiny"))
    assert scale == 2.75
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in loaded.state_dict().items())


WRITERS = {
    "UnifiedTokenizer": lambda model, directory: TINY.tokenizer.save(model, directory, "tiny", 1.0, 6),
    "AutoencoderDC": lambda model, directory: TINY.autoencoder.save(model, directory, 1.0),
    "Diffusion": TINY.diffusion.save,
    "InternVLForConditionalGeneration": save_mllm,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_another_model_than_that_of_the_layout_is_not_written(tmp_path, kind):
    with pytest.raises(TypeError, match=f"^expected {kind}, got Linear$"):
        WRITERS[kind](nn.Linear(2, 2), tmp_path / "part")
    assert not (tmp_path / "part").exists()


def edit_config(directory: Path, *place: str, value: object = None) -> None:
    """Set a nested key of config.json, or take it out."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    inner = config
    for name in place[:-1]:
        inner = inner[name]
    if value is None:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    path.write_text(json.dumps(config))


def edit_weights(directory: Path, name: str, value: Tensor | None) -> None:
    path = directory / "model.safetensors"
    weights = load_file(path)
    if value is None:
        del weights[name]
    else:
        weights[name] = value
    save_file(weights, path)


def cut(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:500])


WEIGHT = "fusion.linear_2.bias"
TOKENIZER_DAMAGE = {
    "no config": (lambda d: (d / "config.json").unlink(), r"config\.json cannot be read as JSON"),
    "a config that is a list": (lambda d: (d / "config.json").write_text("[]"), "holds list, not a config"),
    "another kind": (lambda d: edit_config(d, "kind", value="AutoencoderDC"), "holds no unified tokenizer; the `pre"),
    "no kind": (lambda d: edit_config(d, "kind"), "holds no unified tokenizer"),
    "another preset": (lambda d: edit_config(d, "preset", value="huge"), "preset 'huge', this recipe has 'tiny'"),
    "no preset": (lambda d: edit_config(d, "preset"), "preset 'None', this recipe has 'tiny'"),
    "other streams": (lambda d: edit_config(d, "streams", value="triple"), "config.json has streams = triple"),
    "no scale": (lambda d: edit_config(d, "latent_scale"), "config.json has latent_scale = None"),
    "a scale of 0": (lambda d: edit_config(d, "latent_scale", value=0.0), "config.json has latent_scale = 0.0"),
    "a scale of NaN": (lambda d: edit_config(d, "latent_scale", value=float("nan")), "has latent_scale = nan"),
    "a missing weight": (lambda d: edit_weights(d, WEIGHT, None), f"missing weight {WEIGHT} in "),
    "an extra weight": (lambda d: edit_weights(d, "extra", torch.ones(1)), "unexpected weight extra in "),
    "another shape": (
        lambda d: edit_weights(d, WEIGHT, torch.ones(5)),
        rf"has {WEIGHT} of shape \(5,\), preset 'tiny' needs \(32,\)",
    ),
    "the weights of two streams for one": (
        lambda d: edit_config(d, "streams", value="pixel"),
        "unexpected weight fusion",
    ),
    "a cut file": (cut, r"model\.safetensors cannot be read: "),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), r"holds no model\.safetensors and no index"),
}


@pytest.mark.parametrize("case", TOKENIZER_DAMAGE)
def test_a_tokenizer_that_does_not_fit_is_refused_by_its_key(part, case):
    directory, (damage, message) = part("tokenizer"), TOKENIZER_DAMAGE[case]
    damage(directory)
    with pytest.raises(UserError, match=message) as refusal:
        load_tokenizer(directory)
    assert str(refusal.value).startswith("model.pretrained.tokenizer: ") and str(directory) in str(refusal.value)


def retype(directory: Path, name: str) -> None:
    """Put a file of weights of other bytes in place of the weights."""
    (path,) = directory.glob("*.safetensors")
    path.write_bytes(name.encode() * 50)


PARTS_DAMAGE = {
    "mllm: fewer layers": (
        "mllm", lambda d: edit_config(d, "text_config", "num_hidden_layers", value=6),
        "num_hidden_layers = 6, preset 'tiny' needs 8",
    ),
    "mllm: another width": (
        "mllm", lambda d: edit_config(d, "text_config", "hidden_size", value=64),
        "hidden_size = 64, preset 'tiny' needs 128",
    ),
    "mllm: other words": (
        "mllm", lambda d: edit_config(d, "text_config", "vocab_size", value=70),
        "vocab_size = 70, preset 'tiny' needs 72",
    ),
    "mllm: another image token": (
        "mllm", lambda d: edit_config(d, "image_token_id", value=60), "image_token_id = 60, preset 'tiny' needs 65",
    ),
    "mllm: another vision tower": (
        "mllm", lambda d: edit_config(d, "vision_config", "num_hidden_layers", value=5),
        "num_hidden_layers = 5, preset 'tiny' needs 4",
    ),
    "mllm: a missing weight": (
        "mllm", lambda d: edit_weights(d, "language_model.model.norm.weight", None),
        r"missing weight (model\.)?language_model\.(model\.)?norm\.weight in ",
    ),
    "mllm: no weights": (
        "mllm", lambda d: (d / "model.safetensors").unlink(), r"holds no model\.safetensors and no index",
    ),
    "mllm: no config": ("mllm", lambda d: (d / "config.json").unlink(), "config.json cannot be read as JSON"),
    "mllm: other bytes": ("mllm", lambda d: retype(d, "x"), "the weights in .* cannot be read"),
    "diffusion: fewer layers": (
        "diffusion", lambda d: edit_config(d, "num_layers", value=4), "num_layers = 4, preset 'tiny' needs 6",
    ),
    "diffusion: another width": (
        "diffusion", lambda d: edit_config(d, "attention_head_dim", value=16),
        "attention_head_dim = 16, preset 'tiny' needs 32",
    ),
    "diffusion: no config": ("diffusion", lambda d: (d / "config.json").unlink(), "config.json cannot be read"),
    "diffusion: other bytes": ("diffusion", lambda d: retype(d, "x"), "the weights in .* cannot be read"),
    "pixel_autoencoder: no scale": (
        "pixel_autoencoder", lambda d: edit_config(d, "scaling_factor", value="much"), "has scaling_factor = much",
    ),
    "pixel_autoencoder: a scale of 0": (
        "pixel_autoencoder", lambda d: edit_config(d, "scaling_factor", value=0), "has scaling_factor = 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PARTS_DAMAGE)
def test_a_part_that_does_not_fit_is_refused_by_its_key(part, case):
    name, damage, message = PARTS_DAMAGE[case]
    directory = part(name)
    damage(directory)
    with pytest.raises(UserError, match=message) as refusal:
        LOADERS[name](PretrainedPart(name, directory, "tiny"))
    assert str(refusal.value).startswith(f"model.pretrained.{name}: ")
