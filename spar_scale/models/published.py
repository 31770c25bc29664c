"""A pretrained part on disk, in its library's published layout, held against the shapes that a preset needs.

Parts are read strictly from safetensors: a missing or unexpected tensor, another shape, or a config that differs from
the preset is refused with the dotted key of the recipe. Nothing is ever downloaded. Under `torch.device("meta")` a
part has the shapes of its preset and no values, so none is read: that is how a layout is planned without data or
weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.utils import logging as diffusers_log
from safetensors import SafetensorError
from torch import get_default_device, nn
from transformers.utils import logging as transformers_log

from parallel.errors import UserError

for _library in (diffusers_log, transformers_log):
    _library.disable_progress_bar()  # a bar for each part of a second is noise in a log


@dataclass(frozen=True)
class PretrainedPart:
    """One entry of `model.pretrained`: its name, its directory, and the preset that it must fit."""

    name: str
    directory: Path
    preset: str

    @property
    def config_path(self) -> Path:
        """Its config.json."""
        return self.directory / "config.json"

    def error(self, message: str) -> UserError:
        """Return an error that begins with the recipe's key."""
        return UserError(f"model.pretrained.{self.name}: {message}")

    def config(self) -> dict[str, Any]:
        """Return its config.json. Raises UserError where it cannot be read."""
        try:
            config = json.loads(self.config_path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self.error(f"{self.config_path} cannot be read as JSON ({error})") from error
        if not isinstance(config, dict):
            raise self.error(f"{self.config_path} holds {type(config).__name__}, not a config")
        return config

    def positive(self, config: Mapping[str, Any], name: str) -> float:
        """Return a number above 0 of its config. Raises UserError for anything else."""
        value = config.get(name)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.error(f"{self.config_path} has {name} = {value}; a number above 0 is needed")
        return float(value)

    def check(self, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        """Raise UserError for the first value of its config that is not the expected one."""
        for name, value in json.loads(json.dumps(expected)).items():  # tuples as JSON holds them
            if _listed(found.get(name), value) != value:
                raise self.error(
                    f"{self.config_path} has {name} = {found.get(name)}, preset '{self.preset}' needs {value}"
                )

    def read(self, kind: Any, **options: object) -> Any:
        """Return its model by `kind.from_pretrained`, fp32. Raises UserError for anything but an exact fit."""
        try:
            model, report = kind.from_pretrained(
                str(self.directory), local_files_only=True, use_safetensors=True, output_loading_info=True, **options
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise self.error(f"the weights in {self.directory} cannot be read: {reason}") from error
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if names := sorted(str(name) for name in report.get(problem) or ()):
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise self.error(f"{problem.replace('_keys', '')} weight {names[0]}{more} in {self.directory}")
        return model.float()


def shapes_only() -> bool:
    """Whether a model is being built on the meta device, where nothing has values."""
    return get_default_device().type == "meta"


def copy_weights(target: nn.Module, source: nn.Module) -> None:
    """Copy all weights of `source` into `target`, whose names and shapes are the same."""
    target.load_state_dict(source.state_dict(), strict=True)


def _listed(found: Any, expected: Any) -> Any:
    """A scalar where a list of equal entries is expected means that list (published configs do both)."""
    if isinstance(expected, list) and isinstance(found, (int, str)):
        return [found] * len(expected)
    return found
