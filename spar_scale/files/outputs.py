"""Write the output files of commands: targets are checked before the work starts and written atomically.

A target that is a device, a FIFO or a directory is refused, and so is a directory that is not writable. The format of a
picture follows from the extension of its name. This module does not import torch.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from PIL import Image

from parallel.errors import UserError
from parallel.files import regular_target, replaced

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Extension of a picture's name, in lower case -> the format that Pillow writes."""
LARGEST = {"JPEG": 65500, "WEBP": 16383}  # maximum edge of the format in pixels; that of PNG is 2^31
QUALITY = 95  # of JPEG and WebP, from 0 to 100; Pillow's defaults (75 and 80) give visible blocks in rendered scenes


def make_directory(path: Path, option: str = "") -> None:
    """Create a directory and its parents if they do not exist, and check that it is writable.

    Raises UserError, whose message starts with the name of the command's `option` if it is given.
    """
    where = f"{option}: {path}" if option else str(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{where}: a file or device has the name of this directory; give another directory") from None
    except OSError as error:
        raise UserError(f"{where}: cannot be written ({error.strerror}); give another directory") from None


def check_files(*paths: Path) -> None:
    """Check that the files which a command will write do not exist or are regular files. Raises UserError."""
    for path in paths:
        regular_target(path)


def check_picture(out: Path, read: Path | None = None) -> None:
    """Check that a picture can be written to `out`; create the directories above it.

    Raises UserError if `out` is not a regular file, has an extension that is not in FORMATS, or is the picture that the
    command reads, or if its directory is not writable.
    """
    target = regular_target(out)
    _format(out)
    if read is not None and out.exists() and read.exists() and out.samefile(read):
        raise UserError(f"{out}: is the input picture; write to another file")
    make_directory(target.parent)


def write_picture(picture: Image.Image, out: Path) -> None:
    """Write an RGB picture in the format of the extension of `out`.

    Raises UserError as `check_picture` does, and for a picture larger than LARGEST.
    """
    name, (width, height) = _format(out), picture.size
    limit = LARGEST.get(name)
    if limit is not None and max(width, height) > limit:
        raise UserError(f"{out}: found {width}x{height} pixels, {name} allows {limit} per edge; give a .png file")
    with replaced(out) as temporary:
        picture.save(temporary, format=name, quality=QUALITY)


def _format(out: Path) -> str:
    """Return the format of a file name's extension. Raises UserError for an unknown extension or none."""
    suffix = out.suffix.lower()
    if suffix not in FORMATS:
        found = f"the extension '{out.suffix}'" if suffix else "no extension"
        raise UserError(f"{out}: found {found}, must be one of {', '.join(FORMATS)}, as in out.png")
    return FORMATS[suffix]
