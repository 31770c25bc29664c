"""Scores of reconstructions, and grids to look at them.

PSNR is per image on [0, 1] with range 1, then averaged by the caller: the mean of PSNRs, not the PSNR of
the mean error, as in published reconstruction tables.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

_LABEL_HEIGHT, _GAP = 14, 2  # pixels


def psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each image in dB, (B, C, H, W) in [0, 1] to (B,).

    Equal images give infinity.
    """
    error = (prediction.float() - target.float()).square().flatten(1).mean(1)
    return -10 * torch.log10(error)


def image_psnr(prediction: Image.Image, target: Image.Image) -> float:
    """Return the PSNR in dB of two pictures of the same size. Raises ValueError for different sizes."""
    if prediction.size != target.size:
        raise ValueError(f"pictures of different sizes: {prediction.size} and {target.size}")
    return psnr(to_tensor(prediction)[None], to_tensor(target)[None]).item()


def to_tensor(image: Image.Image) -> Tensor:
    """A picture to (3, H, W) in [0, 1], fp32."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def to_image(tensor: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] to a picture; values outside are clamped, rounded to 8 bits."""
    pixels = (tensor.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def grid(rows: Sequence[Sequence[Image.Image]], labels: Sequence[str], zoom: int = 1) -> Image.Image:
    """Draw rows of pictures below each other, each row under its label; `zoom` repeats pixels.

    A row's height is its tallest picture. Raises ValueError unless there is one label a row.
    """
    if len(rows) != len(labels) or not rows:
        raise ValueError(f"{len(rows)} rows and {len(labels)} labels")
    scaled = [[_zoomed(image, zoom) for image in row] for row in rows]
    width = max(sum(image.width + _GAP for image in row) for row in scaled)
    draw_probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    width = max(width, *(int(draw_probe.textlength(label)) + 2 * _GAP for label in labels))
    heights = [_LABEL_HEIGHT + max(image.height for image in row) + _GAP for row in scaled]
    canvas = Image.new("RGB", (width, sum(heights)), "white")
    draw, top = ImageDraw.Draw(canvas), 0
    for row, label, height in zip(scaled, labels, heights, strict=True):
        draw.text((_GAP, top + 1), label, fill="black")
        left = 0
        for image in row:
            canvas.paste(image, (left, top + _LABEL_HEIGHT))
            left += image.width + _GAP
        top += height
    return canvas


def _zoomed(image: Image.Image, zoom: int) -> Image.Image:
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
