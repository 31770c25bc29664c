"""What commands write: each target is checked before the work begins, and written whole or not at all.

A device, a FIFO or a directory under the target's name is refused, and so is a directory that takes no new file. The
format of a picture follows the extension of its name. This module imports no torch.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from PIL import Image

from parallel.errors import UserError
from parallel.files import regular_target, replaced

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Extension of a picture's name, in lower case -> the format that Pillow writes."""
LARGEST = {"JPEG": 65500, "WEBP": 16383}  # pixels of an edge that the format can hold; PNG holds 2^31
QUALITY = 95  # of JPEG and WebP, from 0 to 100; Pillow's own defaults (75 and 80) show blocks in drawn scenes


def make_directory(path: Path, option: str = "") -> None:
    """Make a directory and its parents where they are absent, and check that it takes new files.

    Raises UserError, which begins with the name of the command's `option` where there is one.
    """
    where = f"{option}: {path}" if option else str(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{where}: a file or device has the name of this directory; name another directory") from None
    except OSError as error:
        raise UserError(f"{where}: cannot be written ({error.strerror}); name another directory") from None


def check_files(*paths: Path) -> None:
    """Check that files which a command will write can replace what has their names. Raises UserError."""
    for path in paths:
        regular_target(path)


def check_picture(out: Path, read: Path | None = None) -> None:
    """Check that a picture can be written to `out`; make the directories above it.

    Raises UserError for what is no regular file, for an extension that is not in FORMATS, for the picture that the
    command reads, and for a directory that takes no new file.
    """
    target = regular_target(out)
    _format(out)
    if read is not None and out.exists() and read.exists() and out.samefile(read):
        raise UserError(f"{out}: is the picture to read; write to another file")
    make_directory(target.parent)


def write_picture(picture: Image.Image, out: Path) -> None:
    """Write an RGB picture in the format that the extension of `out` names. Raises UserError as `check_picture` does.

    A picture larger than LARGEST is refused too.
    """
    name, (width, height) = _format(out), picture.size
    limit = LARGEST.get(name)
    if limit is not None and max(width, height) > limit:
        raise UserError(f"{out}: found {width}x{height} pixels, {name} holds at most {limit} an edge; name a .png file")
    with replaced(out) as temporary:
        picture.save(temporary, format=name, quality=QUALITY)


def _format(out: Path) -> str:
    """The format that a name's extension stands for. Raises UserError for another extension or none."""
    suffix = out.suffix.lower()
    if suffix not in FORMATS:
        found = f"the extension '{out.suffix}'" if suffix else "no extension"
        raise UserError(f"{out}: found {found}, must be one of {', '.join(FORMATS)}; name the picture like out.png")
    return FORMATS[suffix]
