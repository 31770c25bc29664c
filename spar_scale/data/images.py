"""From the bytes of an image file to a square crop, float32 in [0, 1].

The largest square of the image is cut out and resized in one bicubic step (what lies outside it is
never resampled), which bounds the memory whatever the image's proportions. The upright orientation
stored by cameras is applied; transparency is dropped.

Anything wrong with the file is a BadSample: the sample keeps its number and trains with weight 0.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits a channel
EXTENSIONS = ("png", "jpg", "jpeg", "webp")


class BadSample(Exception):
    """A sample that cannot be used; the message is its reason."""


def decode(data: bytes) -> Image.Image:
    """Return an upright RGB image. Raises BadSample for what is no image, is damaged, 1 pixel thin or over 8 bits."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
            if image.mode not in MODES:
                raise BadSample(f"image mode {image.mode}; only 8-bit images are read")
            return ImageOps.exif_transpose(image).convert("RGB")
    except (BadSample, MemoryError):
        raise
    except Exception as error:  # whatever a decoder raises on bytes that are in memory is the sample's fault
        raise BadSample(f"not a readable image ({type(error).__name__}: {error})") from None


def square(image: Image.Image, size: int, along: float, mirrored: bool) -> np.ndarray:
    """Return a square of an image as (3, size, size) float32 in [0, 1].

    `along` in [0, 1] places the square along the longer edge (0.5: in the middle); `mirrored` flips
    left and right. Raises BadSample for an image with an edge of a single pixel.
    """
    width, height = image.size
    edge = min(width, height)
    if edge < 2:
        raise BadSample(f"{width}x{height} pixels; both edges need at least 2")
    left, top = round(along * (width - edge)), round(along * (height - edge))
    cut = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + edge, top + edge))
    pixels = np.asarray(cut)
    if mirrored:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32) / 255
