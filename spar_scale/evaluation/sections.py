"""Sections of an evaluation's results: rows of measurements and the pictures that belong to them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from parallel.files import write_file
from spar_scale.inference.pictures import to_image

Scores = dict[str, float]


@dataclass(frozen=True)
class Section:
    """Rows of measurements, and one picture per row and column: `tiles` (rows, columns, 3, S, S) in [0, 1]."""

    rows: list[dict[str, Any]]
    columns: tuple[str, ...] = ()
    tiles: Tensor | None = None

    def write(self, folder: Path, name: str) -> dict[str, Any]:
        """Write the pictures as one PNG sheet, one row of tiles per row, and return the section as JSON values."""
        if self.tiles is None:
            return {"rows": self.rows}
        tile = self.tiles.shape[-1]
        whole = self.tiles.permute(2, 0, 3, 1, 4).reshape(3, len(self.rows) * tile, len(self.columns) * tile)
        buffer = io.BytesIO()
        picture: Image.Image = to_image(whole)
        picture.save(buffer, "png")
        write_file(folder / f"{name}.png", buffer.getvalue())
        return {"sheet": f"{name}.png", "tile": tile, "columns": list(self.columns), "rows": self.rows}


def mean(values: list[bool] | list[float]) -> float:
    """Return the mean of numbers, or the share of true values."""
    return sum(values) / len(values)
