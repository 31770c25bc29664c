"""Picture files read as training reads them, and pictures side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from parallel.errors import UserError
from spar_scale.data.images import MODES, BadSample, describe, square, to_upright_rgb
from spar_scale.data.spec import Fit
from spar_scale.objectives.quality import psnr

Picture = Image.Image | str | Path
"""A picture or the path of its file."""
_GAP, _COLUMNS = 2, 8  # pixels, pictures in a row


def open_image(path: Path) -> Image.Image:
    """Read a picture upright and as RGB, transparent pixels over white, as training does.

    Raises UserError for a file that is no readable 8-bit image.
    """
    try:
        with Image.open(path) as picture:
            if picture.mode not in MODES:
                raise UserError(f"{path}: image mode {picture.mode}; only 8-bit images are read")
            return to_upright_rgb(picture)[0]
    except (UserError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise UserError(f"{path}: not an image; PNG, JPEG or WebP is needed") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; a readable image is needed") from None
    except Exception as error:  # whatever else a decoder raises is the file's fault
        raise UserError(f"{path}: {describe(error)}; a readable image is needed") from None


def opened(picture: Picture) -> Image.Image:
    """Return a picture, or the picture in a file, upright and as RGB, as training reads it."""
    if not isinstance(picture, Image.Image):
        return open_image(Path(picture))
    if picture.mode not in MODES:
        raise UserError(f"picture: image mode {picture.mode}; only 8-bit images are read")
    return to_upright_rgb(picture.copy())[0]


def fitted(picture: Picture, size: int, fit: Fit) -> Tensor:
    """Return the picture's largest middle square, or with `fit` "stretch" all of it, as (3, size, size) in [0, 1]."""
    try:
        return torch.from_numpy(square(opened(picture), size, along=0.5, mirrored=False, fit=fit))
    except BadSample as error:
        raise UserError(f"{'picture' if isinstance(picture, Image.Image) else picture}: {error}") from None


def sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size side by side, in rows of eight; one alone stays as it is."""
    if len(pictures) == 1:
        return pictures[0]
    width, height = (edge + _GAP for edge in pictures[0].size)
    columns, rows = min(len(pictures), _COLUMNS), -(-len(pictures) // _COLUMNS)
    canvas = Image.new("RGB", (columns * width - _GAP, rows * height - _GAP), "white")
    for place, picture in enumerate(pictures):
        canvas.paste(picture, (place % _COLUMNS * width, place // _COLUMNS * height))
    return canvas


def to_tensor(image: Image.Image) -> Tensor:
    """A picture to (3, H, W) in [0, 1], fp32."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def to_image(tensor: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] to a picture; values outside are clamped, rounded to 8 bits."""
    pixels = (tensor.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def image_psnr(prediction: Image.Image, target: Image.Image) -> float:
    """Return the PSNR in dB of two pictures of the same size. Raises ValueError for different sizes."""
    if prediction.size != target.size:
        raise ValueError(f"pictures of different sizes: {prediction.size} and {target.size}")
    return psnr(to_tensor(prediction)[None], to_tensor(target)[None]).item()
