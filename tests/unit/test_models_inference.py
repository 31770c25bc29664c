"""Pictures of any size through tiles, and PSNR."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from parallel.program import Apply, Layer
from spar_scale.data.spec import SampleSpec
from spar_scale.inference.pictures import image_psnr
from spar_scale.inference.tiles import reconstruct_image
from spar_scale.models.presets import PRESETS
from spar_scale.objectives.quality import psnr
from spar_scale.stages import Stage
from spar_scale.stages.forward import Forward


def forward_of(change: Callable[[Tensor], Tensor]) -> Forward:
    """The forward of a stage whose latents are images, and whose decoder is `change`."""
    layers: list[Layer] = [
        Apply(torch.clone, ("images",), "tokenizer_latent"),
        Apply(change, ("decoder_input",), "reconstruction"),
    ]
    stage = Stage(nn.Identity(), layers, ("images",), {}, {}, SampleSpec(task="images", image_size=32))
    return Forward(stage, PRESETS["tiny"])


class Identity:
    """Hands the images back, and remembers the tiles it saw."""

    def __init__(self):
        self.seen: list[Tensor] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        return images


def top_left(images: Tensor) -> Tensor:
    """Paint each tile with its own top-left pixel, so that tiles put in the wrong place are seen."""
    return images[:, :, :1, :1].expand_as(images)


def picture(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(32, 32), (33, 65), (70, 40), (5, 3), (64, 31)])
def test_any_size_comes_back_as_it_went_in(size):
    decoder, image = Identity(), picture(*size)
    assert np.array_equal(np.array(reconstruct_image(forward_of(decoder), image, 32, batch=2)), np.array(image))
    assert decoder.seen and all(tiles.shape[1:] == (3, 32, 32) and len(tiles) <= 2 for tiles in decoder.seen)


def test_tiles_stay_in_their_place():
    image = picture(12, 8)
    expected = np.array(image)[::4, ::4].repeat(4, axis=0).repeat(4, axis=1)
    assert np.array_equal(np.array(reconstruct_image(forward_of(top_left), image, 4)), expected)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_other_modes_become_rgb(mode):
    image = picture(10, 10).convert(mode)
    result = reconstruct_image(forward_of(Identity()), image, 8)
    assert result.mode == "RGB" and np.array_equal(np.array(result), np.array(image.convert("RGB")))


def test_psnr_by_hand():
    target = torch.zeros(2, 3, 4, 4)
    prediction = target.clone()
    prediction[0] = 0.1
    values = psnr(prediction, target).tolist()
    assert values[0] == pytest.approx(20.0, abs=1e-4) and math.isinf(values[1])
    with pytest.raises(ValueError, match="different sizes"):
        image_psnr(picture(3, 3), picture(3, 4))
