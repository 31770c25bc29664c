"""The tokenizer's layers against the published classes' own forward."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import InternVLModel, Qwen2Config

from parallel.program import Layer, Subprogram
from spar_scale.models.dual_stream import to_grid
from spar_scale.models.initialise import initialise
from spar_scale.models.internvl import vision
from spar_scale.models.presets import PRESETS

TINY: Any = PRESETS["tiny"]


@pytest.fixture(scope="module")
def tokenizer():
    model = TINY.tokenizer.build(TINY.vision, TINY.autoencoder, pixel_encoder=True)
    initialise(model, seed=0)
    return model.eval()


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def run(layers: list[Layer], wanted: str, **slots: torch.Tensor) -> torch.Tensor:
    return Subprogram(layers, (wanted,))(slots)[wanted]


@torch.no_grad()
def test_features_equal_internvl_get_image_features(tokenizer, images):
    config = vision.vision_config(TINY.vision)
    config.text_config = Qwen2Config(
        hidden_size=TINY.vision.output_width, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=8, vocab_size=8,
    )  # fmt: skip
    published = InternVLModel(config).eval()
    published.vision_tower.load_state_dict(tokenizer.vision_tower.state_dict())
    published.multi_modal_projector.load_state_dict(tokenizer.projector.state_dict())
    expected = published.get_image_features(vision.normalise(images), return_dict=True)["pooler_output"]  # type: ignore[index]
    found = run(TINY.vision.feature_layers(tokenizer, frozen=True), "features", images=images)
    assert found.shape == (2, 16, TINY.vision.output_width)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_pixel_shuffle_is_internvls_bit_for_bit():
    tokens = torch.arange(2 * 64 * 6, dtype=torch.float32).view(2, 64, 6)
    published = InternVLModel.pixel_shuffle(
        torch.nn.Module(),  # type: ignore[arg-type]
        tokens.view(2, 8, 8, 6),
        0.5,
    ).reshape(2, 16, 24)
    assert torch.equal(vision.pixel_shuffle(tokens, 0.5), published)
    assert torch.equal(vision.pixel_shuffle(tokens, 1.0), tokens)


def test_shapes_of_the_latent_and_the_image(tokenizer, images):
    seeing = [*TINY.vision.feature_layers(tokenizer, frozen=True), *TINY.tokenizer.latent_layers(tokenizer)]
    latent = run(seeing, "tokenizer_latent", images=images)
    assert latent.shape == (2, *TINY.latent_shape) == (2, 32, 4, 4)
    drawing = TINY.autoencoder.reconstruction_layers(tokenizer.decoder, 32)
    assert run(drawing, "reconstruction", decoder_input=latent).shape == images.shape


@torch.no_grad()
def test_a_latent_becomes_the_image_of_the_published_decoder(tokenizer):
    """Bit for bit, in [0, 1] where the class has [-1, 1]; another size is interpolated."""
    published = TINY.autoencoder.build().eval()
    initialise(published, seed=3)
    latents = torch.randn(2, 32, 4, 4, generator=torch.Generator().manual_seed(4))
    (decoded,) = published.decode(latents, return_dict=False)
    images = (decoded + 1) / 2
    larger = F.interpolate(images, size=(48, 48), mode="bilinear", align_corners=False)
    for side, expected in ((32, images), (48, larger)):
        layers = TINY.autoencoder.reconstruction_layers(published.decoder, side)
        assert torch.equal(run(layers, "reconstruction", decoder_input=latents), expected)


@torch.no_grad()
def test_an_image_becomes_the_latent_of_the_published_encoder(images):
    published = TINY.autoencoder.build().eval()
    initialise(published, seed=3)
    smaller = F.interpolate(images, size=(16, 16), mode="bilinear", align_corners=False)
    for side, seen in ((None, images), (32, images), (16, smaller)):
        layer = TINY.autoencoder.encoding_layer(published.encoder, frozen=True, side=side)
        (expected,) = published.encode(seen * 2 - 1, return_dict=False)
        assert torch.equal(run([layer], "tokenizer_latent", images=images), expected)


def test_the_fusion_starts_as_the_pixel_stream(tokenizer):
    generator = torch.Generator().manual_seed(2)
    semantic, pixel = (torch.randn(2, 16, 32, generator=generator) for _ in range(2))
    assert torch.equal(tokenizer.fusion(semantic, pixel), pixel)


def test_tokens_become_a_grid_in_raster_order():
    tokens = torch.arange(4 * 3).view(1, 4, 3)
    assert to_grid(tokens)[0, :, 1, 0].tolist() == tokens[0, 2].tolist()


def test_decoder_and_encoder_are_the_autoencoders_by_name(tokenizer):
    autoencoder = TINY.autoencoder.build()
    tokenizer.decoder.load_state_dict(autoencoder.decoder.state_dict(), strict=True)
    tokenizer.pixel_encoder.load_state_dict(autoencoder.encoder.state_dict(), strict=True)


def test_the_preset_divides_by_two():
    assert TINY.tokenizer.pixel_heads % 2 == 0 and TINY.vision.heads % 2 == 0
    assert TINY.vision.layers >= 4 and TINY.tokenizer.pixel_layers >= 4
    assert TINY.vision.grid * TINY.autoencoder.compression == TINY.image_size
