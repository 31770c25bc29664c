"""Using a trained tokenizer or autoencoder on pictures of any size.

A picture is cut into tiles of the model's own size, so a model trained on 32-pixel scenes can be
shown a photograph. The trade-off: tiles know nothing of each other, and seams may show.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from spar_scale.inference.pictures import to_image, to_tensor
from spar_scale.stages.forward import Forward


def reconstruct_image(forward: Forward, image: Image.Image, size: int, batch: int = 64) -> Image.Image:
    """Reconstruct a picture of any size and mode, tile by tile; the result is RGB of the same size.

    `size` is the model's image size in pixels. The picture is padded by reflection to whole tiles,
    `batch` tiles run at a time, and the padding is cut off again.
    """
    pixels = to_tensor(image)
    _, height, width = pixels.shape
    padded = _reflected(pixels, -height % size, -width % size)
    rows, columns = padded.shape[1] // size, padded.shape[2] // size
    tiles = padded.unflatten(2, (columns, size)).unflatten(1, (rows, size)).permute(1, 3, 0, 2, 4).flatten(0, 1)
    done = torch.cat([forward.reconstruct(part) for part in tiles.split(batch)])
    stitched = done.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return to_image(stitched[:, :height, :width])


def _reflected(pixels: Tensor, bottom: int, right: int) -> Tensor:
    """Pad by reflection below and to the right, also by more than the picture's own size."""
    return torch.from_numpy(np.pad(pixels.numpy(), ((0, 0), (0, bottom), (0, right)), mode="symmetric"))
