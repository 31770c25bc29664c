"""Parts on disk: the tokenizer comes back as it was, scales are measured, and what does not fit is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from spar_scale.models.autoencoder import build_autoencoder, latent_scale
from spar_scale.models.tokenizer import Streams, UnifiedTokenizer
from spar_scale.stages.bootstrap import save_autoencoder
from spar_scale.stages.tokenizer_files import load_tokenizer, save_tokenizer
from tiny_parts import make_parts
from torch import Tensor

from parallel.errors import UserError
from spar_scale.models.initialise import initialise
from spar_scale.models.presets import PRESETS
from spar_scale.stages.parts import load_autoencoder, load_diffusion, load_mllm

TINY = PRESETS["tiny"]
STREAMS = ("dual", "semantic", "pixel")
TEACHERS = ("pixel_encoder.", "initial_encoder.")


def pictures(number: int = 6) -> Tensor:
    return torch.rand(number, 3, 32, 32, generator=torch.Generator().manual_seed(4))


def tokenizer_of(streams: Streams = "dual", teachers: bool = True) -> UnifiedTokenizer:
    model = UnifiedTokenizer(TINY, streams, pixel_encoder=teachers, initial_encoder=teachers)
    initialise(model, seed=2)
    return model.eval()


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, str]:
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def part(parts, tmp_path):
    """Return a function that copies a part's directory, to be damaged."""

    def copy(name: str) -> Path:
        return shutil.copytree(parts[name], tmp_path / name)

    return copy


@pytest.mark.parametrize("streams", STREAMS)
def test_a_tokenizer_comes_back_bit_by_bit_without_its_teachers(tmp_path, streams):
    model, images = tokenizer_of(streams), pictures()
    save_tokenizer(model, tmp_path / "part", images)
    loaded, scale = load_tokenizer(tmp_path / "part", TINY)
    kept = {name: weight for name, weight in model.state_dict().items() if not name.startswith(TEACHERS)}
    assert len(kept) < len(model.state_dict())
    assert loaded.streams == streams and loaded.state_dict().keys() == kept.keys()
    assert all(torch.equal(weight, kept[name]) for name, weight in loaded.state_dict().items())
    latents = torch.cat([model.encode(image[None]) for image in images]).double()
    deviation = ((latents - latents.mean()) ** 2).sum().div(latents.numel() - 1).sqrt()
    assert scale == pytest.approx(1 / deviation.item(), rel=1e-4) and abs(scale - 1) > 0.1


def test_the_scale_is_the_inverse_deviation_over_all_images_whatever_the_batches():
    images = torch.tensor([0.0, 2.0, 4.0, 6.0]).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    deviation = (20 * 12 / 47) ** 0.5  # squares 9 + 1 + 1 + 9 of twelve elements each, over 48 - 1
    for batch in (1, 3, 64):
        assert latent_scale(lambda part: part, images, batch) == pytest.approx(1 / deviation, rel=1e-6)


def test_an_autoencoder_hands_on_the_scale_that_was_measured(tmp_path):
    model = build_autoencoder(TINY)
    initialise(model, seed=3)
    save_autoencoder(model, tmp_path, pictures())
    loaded, scale = load_autoencoder(tmp_path, TINY)
    with torch.no_grad():
        latents = torch.cat([model.encoder(image[None] * 2 - 1) for image in pictures()])
    assert scale == pytest.approx(1 / latents.std().item(), rel=1e-4) and abs(scale - 1) > 0.1
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in loaded.state_dict().items())


@pytest.mark.parametrize("given", ["no images", "another model"])
def test_a_tokenizer_is_not_written_unmeasured_and_nothing_else_is(tmp_path, given):
    model = tokenizer_of(teachers=False) if given == "no images" else build_autoencoder(TINY)
    with pytest.raises(TypeError, match="a unified tokenizer and images"):
        save_tokenizer(model, tmp_path / "part", None if given == "no images" else pictures())
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
WRONG_WEIGHT = r"weight {} is missing, unexpected or of another shape in model\.safetensors$"
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
    "a missing weight": (lambda d: edit_weights(d, WEIGHT, None), WRONG_WEIGHT.format(WEIGHT)),
    "an extra weight": (lambda d: edit_weights(d, "extra", torch.ones(1)), WRONG_WEIGHT.format("extra")),
    "another shape": (lambda d: edit_weights(d, WEIGHT, torch.ones(5)), WRONG_WEIGHT.format(WEIGHT)),
    "the weights of two streams for one": (
        lambda d: edit_config(d, "streams", value="pixel"),
        WRONG_WEIGHT.format("fusion.*"),
    ),
    "a cut file": (cut, r"model\.safetensors cannot be read \("),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), r"model\.safetensors cannot be read \("),
}


@pytest.mark.parametrize("case", TOKENIZER_DAMAGE)
def test_a_tokenizer_that_does_not_fit_is_refused_by_its_key(part, case):
    directory, (damage, message) = part("tokenizer"), TOKENIZER_DAMAGE[case]
    damage(directory)
    with pytest.raises(UserError, match=message) as refusal:
        load_tokenizer(directory, TINY)
    assert str(refusal.value).startswith(f"model.pretrained.tokenizer: {directory}")


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
        "mllm", lambda d: (d / "model.safetensors").unlink(), "the weights in .* cannot be read",
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
LOADERS = {"mllm": load_mllm, "diffusion": load_diffusion, "pixel_autoencoder": load_autoencoder}


@pytest.mark.parametrize("case", PARTS_DAMAGE)
def test_a_part_that_does_not_fit_is_refused_by_its_key(part, case):
    name, damage, message = PARTS_DAMAGE[case]
    directory = part(name)
    damage(directory)
    with pytest.raises(UserError, match=message) as refusal:
        LOADERS[name](directory, TINY)
    assert str(refusal.value).startswith(f"model.pretrained.{name}: ")
