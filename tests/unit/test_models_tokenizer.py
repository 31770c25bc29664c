"""The tokenizer's parts against the published classes' own forward."""

import pytest
import torch
from spar_scale.models.autoencoder import build_autoencoder
from spar_scale.models.tokenizer import UnifiedTokenizer, to_grid
from transformers import InternVLModel, Qwen2Config

from spar_scale.models import vision
from spar_scale.models.initialise import initialise
from spar_scale.models.presets import PRESETS

TINY = PRESETS["tiny"]


@pytest.fixture(scope="module")
def tokenizer():
    model = UnifiedTokenizer(TINY)
    initialise(model, seed=0)
    return model.eval()


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_features_equal_internvl_get_image_features(tokenizer, images):
    config = vision.vision_config(TINY)
    config.text_config = Qwen2Config(
        hidden_size=TINY.streams.width, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=8, vocab_size=8,
    )  # fmt: skip
    published = InternVLModel(config).eval()
    published.vision_tower.load_state_dict(tokenizer.vision_tower.state_dict())
    published.multi_modal_projector.load_state_dict(tokenizer.projector.state_dict())
    expected = published.get_image_features(vision.normalise(images), return_dict=True)["pooler_output"]  # type: ignore[index]
    found = vision.features(tokenizer.vision_tower, tokenizer.projector, images, TINY.vision.downsample_ratio)
    assert found.shape == (2, 16, TINY.streams.width)
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
    latent = tokenizer.encode(images)
    assert latent.shape[1:] == (32, 4, 4)
    reconstructed = tokenizer.reconstruct(images * 100)
    assert reconstructed.shape == images.shape
    assert reconstructed.min() >= 0 and reconstructed.max() <= 1


def test_the_fusion_starts_as_the_pixel_stream(tokenizer):
    generator = torch.Generator().manual_seed(2)
    semantic, pixel = (torch.randn(2, 16, 32, generator=generator) for _ in range(2))
    assert torch.equal(tokenizer.fusion(semantic, pixel), pixel)


def test_tokens_become_a_grid_in_raster_order():
    tokens = torch.arange(4 * 3).view(1, 4, 3)
    assert to_grid(tokens)[0, :, 1, 0].tolist() == tokens[0, 2].tolist()


def test_decoder_and_encoder_are_the_autoencoders_by_name(tokenizer):
    autoencoder = build_autoencoder(TINY)
    tokenizer.decoder.load_state_dict(autoencoder.decoder.state_dict(), strict=True)
    tokenizer.pixel_encoder.load_state_dict(autoencoder.encoder.state_dict(), strict=True)


def test_the_preset_divides_by_two():
    assert TINY.streams.pixel_heads % 2 == 0 and TINY.vision.heads % 2 == 0
    assert TINY.vision.layers >= 4 and TINY.streams.pixel_layers >= 4
    assert TINY.vision.grid * TINY.autoencoder.compression == TINY.image_size
