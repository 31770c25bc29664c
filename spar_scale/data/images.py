"""Decode an image file and make it a square, float32 in [0, 1].

The largest square of the image, or the whole image, is resized in one bicubic step. Pixels outside the square are never
resampled, so memory is bounded for every aspect ratio. The EXIF orientation is applied. Transparent pixels are
composited over white, because no viewer shows the colours stored in them.

Every fault of a file raises BadSample: the sample keeps its number and trains with weight 0.
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

from spar_scale.data.spec import Fit

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # Pillow's modes with at most 8 bits per channel
EXTENSIONS = ("png", "jpg", "jpeg", "webp")
READERS = {PngImageFile: "png", JpegImageFile: "jpg", WebPImageFile: "webp"}
"""Pillow's class of each supported format -> its extension. Variants such as MPO are subclasses of the JPEG class."""


class BadSample(Exception):
    """A sample that cannot be used; the message is its reason."""


@dataclass(frozen=True)
class Picture:
    """A decoded image file: `image` is upright RGB; `transparent` is whether a pixel was composited over white."""

    image: Image.Image
    extension: str
    transparent: bool


def decode(data: bytes) -> Image.Image:
    """Return an upright RGB image, transparent pixels over white. Raises BadSample as `read_picture` does."""
    return read_picture(data).image


def read_picture(data: bytes) -> Picture:
    """Decode an image file. Raises BadSample if it is not PNG, JPEG or WebP, is damaged, or has over 8 bits."""
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
        raise BadSample(f"not a readable image ({found}; expected PNG, JPEG or WebP)") from None
    except Exception as error:  # the bytes are in memory, so any error of a decoder is the sample's fault
        raise BadSample(f"not a readable image ({describe(error)})") from None


def to_upright_rgb(image: Image.Image) -> tuple[Image.Image, bool]:
    """Return an opened image upright and as RGB, and whether a pixel was transparent.

    A pixel of opacity a becomes a * colour + (1 - a) * white. An opaque image keeps its colours.
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
    """Convert the single transparent colour of a PNG (tRNS chunk) from the file's bit depth to 8 bits.

    Pillow 13 converts pixels of 2, 4 and 16 bits but not this colour, which then matches no pixel or wrong ones. Remove
    this when the canary test that compares the two fails.
    """
    tiles = getattr(image, "tile", None)  # only an image that is not decoded yet has the file's bit depth here
    colour, depth = image.info.get("transparency"), tiles[0].args if tiles else None
    if depth in ("L;2", "L;4") and isinstance(colour, int):
        image.info["transparency"] = colour * (85 if depth == "L;2" else 17)
    elif depth == "RGB;16B" and isinstance(colour, tuple):
        image.info["transparency"] = tuple(channel >> 8 for channel in colour)


def describe(error: Exception) -> str:
    """Return the type and message of an exception without memory addresses, so that equal faults have equal texts."""
    return f"{type(error).__name__}: " + re.sub(r" at 0x[0-9a-fA-F]+", "", str(error))


def square(image: Image.Image, size: int, along: float, mirrored: bool, fit: Fit) -> np.ndarray:
    """Return an image as a square (3, size, size) float32 in [0, 1].

    `fit` "crop" takes the largest square; `along` in [0, 1] is its position on the longer edge (0.5: the middle).
    `fit` "stretch" takes the whole image. `mirrored` flips left and right. Raises BadSample for an image with an edge
    of one pixel.
    """
    width, height = image.size
    edge = min(width, height)
    if edge < 2:
        raise BadSample(f"{width}x{height} pixels; both edges need at least 2")
    left, top = round(along * (width - edge)), round(along * (height - edge))
    box = (left, top, left + edge, top + edge) if fit == "crop" else (0, 0, width, height)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
    if mirrored:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32) / 255
