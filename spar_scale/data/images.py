"""From the bytes of an image file to a square crop, float32 in [0, 1].

The largest square of the image is cut out and resized in one bicubic step (what lies outside it is
never resampled), which bounds the memory whatever the image's proportions. The upright orientation
stored by cameras is applied. Transparent pixels are laid over white: the colours stored below them are
leftovers that no viewer shows.

Anything wrong with the file is a BadSample: the sample keeps its number and trains with weight 0.
"""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits a channel
EXTENSIONS = ("png", "jpg", "jpeg", "webp")
READERS = {PngImageFile: "png", JpegImageFile: "jpg", WebPImageFile: "webp"}
"""Pillow's class of each format that is read -> its extension. Variants such as MPO are subclasses of JPEG's."""


class BadSample(Exception):
    """A sample that cannot be used; the message is its reason."""


@dataclass(frozen=True)
class Picture:
    """A decoded image file: `image` is upright RGB; `transparent` is whether a pixel was laid over white."""

    image: Image.Image
    extension: str
    transparent: bool


def decode(data: bytes) -> Image.Image:
    """Return an upright RGB image, transparent pixels over white. Raises BadSample as `read_picture` does."""
    return read_picture(data).image


def read_picture(data: bytes) -> Picture:
    """Decode an image file. Raises BadSample for what is no PNG, JPEG or WebP, is damaged, or has over 8 bits."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=[str(reader.format) for reader in READERS])
            if image.mode not in MODES:
                raise BadSample(f"image mode {image.mode}; only 8-bit images are read")
            extension = next(READERS[reader] for reader in READERS if isinstance(image, reader))
            upright, transparent = to_upright_rgb(image)
            return Picture(upright, extension, transparent)
    except (BadSample, MemoryError):
        raise
    except UnidentifiedImageError:
        found = f"the first of {len(data)} bytes are {data[:8]!r}" if data else "0 bytes"
        raise BadSample(f"not a readable image ({found}; PNG, JPEG or WebP is needed)") from None
    except Exception as error:  # whatever a decoder raises on bytes that are in memory is the sample's fault
        raise BadSample(f"not a readable image ({describe(error)})") from None


def to_upright_rgb(image: Image.Image) -> tuple[Image.Image, bool]:
    """Return an opened image upright and as RGB, and whether a pixel was transparent.

    A transparent pixel of opacity a becomes a * colour + (1 - a) * white. An image without one keeps its colours.
    """
    _rescale_transparent_colour(image)
    upright = ImageOps.exif_transpose(image)
    if not upright.has_transparency_data:
        return upright.convert("RGB"), False
    layered = upright.convert("RGBA")
    opacity = layered.getchannel("A")
    if opacity.getextrema() == (255, 255):
        return layered.convert("RGB"), False
    canvas = Image.new("RGB", layered.size, "white")
    canvas.paste(layered, mask=opacity)
    return canvas, True


def _rescale_transparent_colour(image: Image.Image) -> None:
    """Bring the one transparent colour of a PNG from the file's bit depth to 8 bits.

    Pillow 13 does so with the pixels of 2, 4 and 16 bits and not with this colour, which then matches no pixel or
    other ones. Remove this when the test that compares the two fails.
    """
    tiles = getattr(image, "tile", None)  # of a file that is not decoded yet
    colour, depth = image.info.get("transparency"), tiles[0].args if tiles else None
    if depth in ("L;2", "L;4") and isinstance(colour, int):
        image.info["transparency"] = colour * (85 if depth == "L;2" else 17)
    elif depth == "RGB;16B" and isinstance(colour, tuple):
        image.info["transparency"] = tuple(channel >> 8 for channel in colour)


def describe(error: Exception) -> str:
    """Return the type and message of an exception without memory addresses, so that equal faults read equal."""
    return f"{type(error).__name__}: " + re.sub(r" at 0x[0-9a-fA-F]+", "", str(error))


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
