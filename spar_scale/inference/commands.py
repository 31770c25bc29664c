"""Bodies of the commands that use a trained run."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from parallel.errors import UserError
from spar_scale.evaluation.reconstruction import image_psnr
from spar_scale.inference.pipeline import reconstruct_image
from spar_scale.stages.parts import preset_of
from spar_scale.training.export import recipe_of, trained_model


def reconstruct(run_dir: Path, image: Path, out: Path) -> str:
    """Pass a picture of any size through the run's model and back; write a PNG, return what was done."""
    model, checkpoint = trained_model(run_dir)
    picture = open_image(image)
    size = preset_of(recipe_of(run_dir)).image_size
    result = reconstruct_image(model, picture, size)  # type: ignore[arg-type]
    out.parent.mkdir(parents=True, exist_ok=True)
    result.save(out, format="PNG")
    return f"{out}: {image} through the average of {checkpoint}, PSNR {image_psnr(result, picture):.2f} dB"


def open_image(path: Path) -> Image.Image:
    """Read a picture as RGB. Raises UserError for anything else."""
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except UnidentifiedImageError:
        raise UserError(f"{path}: not an image; PNG, JPEG or WebP is needed") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; a readable image is needed") from None
