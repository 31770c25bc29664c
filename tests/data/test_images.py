"""Image files of every format and mode: which pixels they give, which are refused, and the reasons."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from parallel.errors import UserError
from spar_scale.data.images import BadSample, decode, describe, read_picture
from spar_scale.inference.pictures import open_image

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def colours(width: int = 24, height: int = 16, channels: int = 3) -> np.ndarray:
    """Random pixels (height, width, channels), uint8."""
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "png", **options) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    """The decoded pixels (height, width, 3)."""
    return np.asarray(decode(data))


def raw_png(depth: int, kind: int, rows: list[bytes], width: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of `depth` bits and colour type `kind` from its packed rows, with `chunks` before the pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, kind, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, content) for name, content in parts)


def two_pixels(storage: str) -> bytes:
    """An image file of a transparent red pixel beside an opaque blue one, by how transparency is stored."""
    rgba = Image.fromarray(np.array([[(*RED, 0), (*BLUE, 255)]], np.uint8))
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *BLUE])
    palette.putpixel((1, 0), 1)
    files = {
        "RGBA": encoded(rgba),
        "WebP": encoded(rgba, "webp", lossless=True, exact=True),
        "P, one entry": encoded(palette, transparency=0),
        "P, table": encoded(palette, transparency=b"\x00\xff"),
        "RGB, one colour": encoded(rgba.convert("RGB"), transparency=RED),
        "RGB of 16 bits": raw_png(
            16, 2, [struct.pack(">6H", 0x8000, 0, 0, 0, 0, 0xFFFF)], 2, (b"tRNS", struct.pack(">3H", 0x8000, 0, 0))
        ),
    }  # fmt: skip
    return files[storage]


@pytest.mark.parametrize("storage", ["RGBA", "WebP", "P, one entry", "P, table", "RGB, one colour", "RGB of 16 bits"])
def test_a_transparent_pixel_becomes_white_and_an_opaque_one_keeps_its_colour(storage: str, tmp_path: Path):
    data = two_pixels(storage)
    assert pixels(data).tolist() == [[list(WHITE), list(BLUE)]]
    assert read_picture(data).transparent
    (tmp_path / "picture").write_bytes(data)
    assert np.array_equal(np.asarray(open_image(tmp_path / "picture")), pixels(data))


@pytest.mark.parametrize(
    ("depth", "row", "colour", "expected"),
    [
        (1, 0b0100_0000, 1, [0, 255, 0, 0]),
        (2, 0b0001_1011, 2, [0, 85, 255, 255]),
        (4, 0x0A, 0, [255, 170]),
        (4, 0x3F, 3, [255, 255]),
    ],
)
def test_the_transparent_grey_of_a_png_has_the_bit_depth_of_its_pixels(depth, row, colour, expected):
    data = raw_png(depth, 0, [bytes([row])], len(expected), (b"tRNS", struct.pack(">H", colour)))
    assert pixels(data)[0, :, 0].tolist() == expected


def test_pillow_still_leaves_the_transparent_colour_in_the_bit_depth_of_the_file():
    """If this fails, `_rescale_transparent_colour` is no longer needed."""
    data = raw_png(4, 0, [bytes([0x3F])], 2, (b"tRNS", struct.pack(">H", 3)))
    assert Image.open(io.BytesIO(data)).convert("RGBA").getpixel((0, 0)) == (51, 51, 51, 255)


def test_half_transparency_mixes_with_white():
    grey_and_opacity = Image.fromarray(np.array([[(100, 0), (100, 102), (100, 255)]], np.uint8))
    assert grey_and_opacity.mode == "LA"
    assert pixels(encoded(grey_and_opacity))[0, :, 0].tolist() == [255, 255 - round(0.4 * 155), 100]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_an_image_without_transparent_pixels_keeps_its_colours(mode: str):
    image = Image.fromarray(colours()).convert(mode)
    assert np.array_equal(pixels(encoded(image)), np.asarray(image.convert("RGB")))
    assert not read_picture(encoded(image)).transparent


@pytest.mark.parametrize("transparency", [bytes([255] * 256), 255])
def test_a_palette_with_a_transparent_entry_that_no_pixel_uses_keeps_its_colours(transparency: bytes | int):
    image = Image.fromarray(colours()).quantize(16)
    data = encoded(image, transparency=transparency)
    assert np.array_equal(pixels(data), np.asarray(image.convert("RGB")))
    assert not read_picture(data).transparent


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_turns_colours_and_transparency_alike(orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(colours(channels=4))
    canvas = Image.new("RGBA", stored.size, "white")
    flat = Image.alpha_composite(canvas, stored).convert("RGB")
    turned, expected = (pixels(encoded(image, exif=exif)).astype(int) for image in (stored, flat))
    assert turned.shape == ((24, 16, 3) if orientation > 4 else (16, 24, 3))
    assert abs(turned - expected).max() <= 1  # two ways of rounding


def jpeg(**options) -> bytes:
    return encoded(Image.fromarray(colours()), "jpeg", **options)


def animated(kind: str) -> bytes:
    """Two frames, of which the first is red."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


def bad_checksum(data: bytes) -> bytes:
    """The PNG with a wrong CRC of its header."""
    return data[:29] + bytes(4) + data[33:]


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
READ = {
    "progressive JPEG": (jpeg(progressive=True), "jpg", jpeg()),
    "two pictures in a JPEG": (animated("mpo"), "jpg", encoded(Image.new("RGB", (8, 8), RED), "jpeg")),
    "animated PNG": (animated("png"), "png", encoded(Image.new("RGB", (8, 8), RED))),
    "animated WebP": (animated("webp"), "webp", encoded(Image.new("RGB", (8, 8), RED), "webp")),
    "colour profile": (jpeg(icc_profile=PROFILE), "jpg", jpeg()),
    "broken colour profile": (jpeg(icc_profile=b"no profile"), "jpg", jpeg()),
    "bytes behind the end": (jpeg() + b"more", "jpg", jpeg()),
    "PNG of 48 bits": (
        raw_png(16, 2, [bytes(range(48))] * 2, 8), "png", raw_png(8, 2, [bytes(range(0, 48, 2))] * 2, 8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_variants_of_a_format_give_the_pixels_of_the_plain_file(case: str, tmp_path: Path):
    data, extension, plain = READ[case]
    assert np.array_equal(pixels(data), pixels(plain))
    assert read_picture(data).extension == extension
    (tmp_path / "picture").write_bytes(data)
    assert np.array_equal(np.asarray(open_image(tmp_path / "picture")), pixels(plain))


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_a_jpeg_of_another_colour_space_has_its_colours(mode: str):
    image = Image.new("RGB", (16, 16), (200, 30, 30)).convert(mode)
    expected = np.asarray(image.convert("RGB")).astype(int)
    assert abs(pixels(encoded(image, "jpeg", quality=100)) - expected).max() <= 3


def bomb() -> bytes:
    """A PNG whose header claims 60000 x 60000 pixels."""
    plain = encoded(Image.new("RGB", (8, 8)))
    header = b"IHDR" + struct.pack(">II", 60000, 60000) + plain[24:29]
    return plain[:12] + header + struct.pack(">I", zlib.crc32(header)) + plain[33:]


WHOLE = Image.fromarray(colours(64, 64))
UNREADABLE = {
    "a web page": (b"<!DOCTYPE html><html></html>", "expected PNG, JPEG or WebP"),
    "an empty file": (b"", "0 bytes"),
    "zeros": (bytes(2000), "2000 bytes"),
    "a cut PNG": (encoded(WHOLE)[:-200], "truncated"),
    "a PNG of its first bytes": (encoded(WHOLE)[:20], "not a readable image"),
    "a cut JPEG": (encoded(WHOLE, "jpeg")[:-400], "truncated"),
    "a cut WebP": (encoded(WHOLE, "webp")[:-400], "not a readable image"),
    "a wrong checksum": (bad_checksum(encoded(WHOLE)), "not a readable image"),
    "a GIF": (encoded(WHOLE, "gif"), "GIF8"),
    "16 bits of grey": (encoded(WHOLE.convert("I;16")), "image mode I;16; only 8-bit images are read"),
    "a decompression bomb": (bomb(), "DecompressionBomb"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_equal_faults_give_equal_reasons_without_memory_addresses(case: str):
    data, part = UNREADABLE[case]
    reasons = set()
    for copy in (bytearray(data), bytearray(data)):
        with pytest.raises(BadSample) as bad:
            decode(bytes(copy))
        reasons.add(str(bad.value))
    (reason,) = reasons
    assert part in reason and "0x" not in reason


def test_no_description_of_an_exception_holds_a_memory_address():
    broken = io.BytesIO()
    assert describe(ValueError(f"cannot read {broken}")) == "ValueError: cannot read <_io.BytesIO object>"


@pytest.mark.parametrize("case", ["a web page", "an empty file", "a cut JPEG", "a wrong checksum", "16 bits of grey"])
def test_an_unreadable_picture_given_by_path_is_refused_with_its_name(case: str, tmp_path: Path):
    (tmp_path / "picture.png").write_bytes(UNREADABLE[case][0])
    with pytest.raises(UserError, match=r"picture\.png: ") as refusal:
        open_image(tmp_path / "picture.png")
    assert "0x" not in str(refusal.value)
