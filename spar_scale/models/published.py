"""A pretrained part on disk, in its library's published layout, held against the shapes that a preset needs.

Parts are read strictly from safetensors: a missing or unexpected tensor, another shape, or a number in config.json that
changes the output and differs from the preset is refused with the dotted key of the recipe. Nothing is ever downloaded.
Under `torch.device("meta")` a part has the shapes of its preset and no values, so none is read: that is how a layout is
planned without data or weights.

A model is built with its parameters on the meta device (`parameters_on_meta`), so that no memory holds values that are
replaced anyway. `PretrainedPart.fill` notes at each parameter where its values are (`Stored`), and reads them, one
tensor at a time and in the precision that is asked for. Within `deferred_weights` they are only noted: `read_weights`
then reads those of the layers that a process keeps, and of a matrix that is cut its own part.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_log
from safetensors import SafetensorError, safe_open
from torch import Tensor, get_default_device, nn
from transformers.utils import logging as transformers_log

from parallel.errors import UserError

for _library in (diffusers_log, transformers_log):
    _library.disable_progress_bar()  # a bar for each part of a second is noise in a log

_deferred = ContextVar("deferred", default=False)


@dataclass(frozen=True)
class Stored:
    """Where the values of a parameter are: a tensor of a file, which is read in a precision."""

    part: PretrainedPart
    path: Path
    name: str

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the whole tensor in a precision, else that of the part. Raises UserError for an unreadable file."""
        with self.part.opened(self.path) as file:
            return file.get_tensor(self.name).to(dtype or self.part.dtype)


@dataclass(frozen=True)
class PretrainedPart:
    """One entry of `model.pretrained`: its name, its directory, the preset that it must fit, and its precision.

    With `headers_only` it is held against the preset also where nothing has values: its config and the headers of its
    files are read, no weights.
    """

    name: str
    directory: Path
    preset: str
    dtype: torch.dtype = torch.float32
    headers_only: bool = False

    @property
    def config_path(self) -> Path:
        """Its config.json."""
        return self.directory / "config.json"

    @property
    def is_checked(self) -> bool:
        """Whether its directory is read at all: not where only the preset's shapes are wanted."""
        return self.headers_only or not shapes_only()

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

    def check_kind(self, config: Mapping[str, Any], key: str, expected: str, hint: str) -> None:
        """Raise UserError for the config of another kind of model; a config that names none is no other kind."""
        if (found := config.get(key, expected)) != expected:
            raise self.error(f"{self.config_path} has {key} = {found}, '{expected}' is needed: {hint}")

    def check(
        self,
        config: Mapping[str, Any],
        expected: Mapping[str, Any],
        defaults: Mapping[str, Any] | None = None,
        section: str = "",
    ) -> None:
        """Raise UserError for the first value of a config, or of a section of it, that is not the expected one.

        A key that the config does not have stands at the library's default, as it does where the library reads it.
        """
        inside = f"{section}." if section else ""
        for name, value in json.loads(json.dumps(expected)).items():  # tuples as JSON holds them
            found = config.get(name, json.loads(json.dumps((defaults or {}).get(name))))
            if _listed(found, value) != value:
                meant = f"has {inside}{name} =" if name in config else f"has no {inside}{name}, which means"
                raise self.error(f"{self.config_path} {meant} {found}, preset '{self.preset}' needs {value}")

    def files(self, stem: str) -> list[Path]:
        """Return its files of weights: `stem`.safetensors, or those of an index. Raises UserError for other files."""
        whole = self.directory / f"{stem}.safetensors"
        if whole.is_file():
            return [whole]
        index = self.directory / f"{stem}.safetensors.index.json"
        if not index.is_file():
            raise self.error(self._without_weights(whole.name))
        try:
            names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self.error(f"{index} cannot be read as an index of weights ({error!r})") from error
        for name in names:
            if Path(name).name != name or not (self.directory / name).is_file():
                raise self.error(f"{self.directory} holds no {name}, which {index.name} names; copy all of its files")
        return [self.directory / name for name in names]

    def _without_weights(self, needed: str) -> str:
        stem = needed.removesuffix(".safetensors")
        names = sorted(path.name for path in self.directory.glob("*") if path.is_file())
        if variants := [name for name in names if name.startswith(f"{stem}.") and name.endswith(".safetensors")]:
            variant = variants[0].removeprefix(f"{stem}.").split(".")[0]
            return (
                f"{self.directory} holds the variant '{variant}' only ({variants[0]}); {needed} is needed, the weights"
                " in full precision, which the same repository has"
            )
        if pickled := [name for name in names if name.endswith((".bin", ".pt", ".pth"))]:
            return (
                f"{self.directory} holds pickled weights only ({pickled[0]}), which are never read; {needed} is needed:"
                " load them with their library and write them with save_pretrained"
            )
        return f"{self.directory} holds no {needed} and no index of several files; copy the part again"

    @contextmanager
    def opened(self, path: Path) -> Iterator[Any]:
        """Open a file of weights. Raises UserError where it cannot be read."""
        try:
            # The other backend maps the file: a tensor that needs no conversion would stay a view of it.
            with safe_open(path, framework="pt", backend="pread") as file:  # pyright: ignore[reportCallIssue]
                yield file
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise self.error(f"the weights in {path} cannot be read: {reason}") from error

    def fill(
        self,
        model: nn.Module,
        stem: str,
        rename: Callable[[str], str | None] = str,
        copies: Mapping[str, str] | None = None,
    ) -> None:
        """Give a model, whose parameters are on the meta device, the weights in the files `stem`.

        Args:
            model: its parameters' names are those of the files after `rename`.
            stem: name of the files of weights without their ending.
            rename: from a name in the files to one of the model, None for a weight that is left behind.
            copies: parameters which are equal to another one where the files do not have them.

        Raises UserError for a weight that is missing, unexpected or of another shape.
        """
        if not self.is_checked:
            return
        parameters, found = dict(model.named_parameters()), dict[str, Stored]()
        for path in self.files(stem):
            with self.opened(path) as file:
                for name in file.keys():  # noqa: SIM118
                    mine = rename(name)
                    if mine is None:
                        continue
                    if mine not in parameters or mine in found:
                        raise self.error(f"unexpected weight {name} in {path}")
                    shape, needed = tuple(file.get_slice(name).get_shape()), tuple(parameters[mine].shape)
                    if shape != needed:
                        raise self.error(
                            f"{path} has {name} of shape {shape}, preset '{self.preset}' needs {needed};"
                            " name a part of this preset, or set model.preset"
                        )
                    found[mine] = Stored(self, path, name)
        for mine, other in (copies or {}).items():
            if mine not in found and other in found:
                found[mine] = found[other]
        if missing := sorted(parameters.keys() - found.keys()):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise self.error(f"missing weight {missing[0]}{more} in {self.directory}")
        if shapes_only():
            return
        for mine, stored in found.items():
            parameters[mine].stored = stored  # pyright: ignore[reportAttributeAccessIssue]
        if not _deferred.get():
            read_weights(model)


def shapes_only() -> bool:
    """Whether a model is being built on the meta device, where nothing has values."""
    return get_default_device().type == "meta"


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Build modules whose parameters have no values yet; their buffers have."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


@contextmanager
def deferred_weights() -> Iterator[None]:
    """Leave the weights of the parts that are loaded in their files, for `read_weights` to read."""
    token = _deferred.set(True)
    try:
        yield
    finally:
        _deferred.reset(token)


def read_weights(module: nn.Module) -> None:
    """Read those parameters of a module that are still in files; of a cut one only the part of this rank is kept."""
    for parameter in module.parameters():
        stored = getattr(parameter, "stored", None)
        if parameter.is_meta and stored is not None:
            with torch.no_grad():
                value, cut = stored.read(), getattr(parameter, "tensor_cut", None)
                if cut is not None:
                    pieces = [value.narrow(cut.dim, start, length) for start, length in cut.segments]
                    value = torch.cat(pieces, cut.dim).contiguous()
            set_values(parameter, value)


def fp32_values(parameter: Tensor) -> Tensor:
    """Return the values of a parameter in fp32: those in its file, if it has one, not what they are rounded to."""
    stored: Stored | None = getattr(parameter, "stored", None)
    return parameter.detach().float() if stored is None else stored.read(torch.float32)


def replace_values(parameter: Tensor, values: Tensor) -> None:
    """Give a parameter other values than those in its file, in its precision."""
    attributes: dict[str, Any] = vars(parameter)
    stored: Stored | None = attributes.pop("stored", None)
    if parameter.is_meta and stored is not None:
        set_values(parameter, values.to(stored.part.dtype, copy=True))
    else:
        with torch.no_grad():
            parameter.copy_(values)


def forget_values(model: nn.Module, kept: Collection[int]) -> None:
    """Free the memory of all parameters but those with the ids `kept`: another process has them."""
    for parameter in model.parameters():
        if id(parameter) not in kept and not parameter.is_meta:
            set_values(parameter, torch.empty_like(parameter, device="meta"))


def set_values(parameter: Tensor, values: Tensor) -> None:
    """Put values in place of a parameter's; whoever refers to the parameter has them, its attributes stay."""
    filled: Any = nn.Parameter(values, parameter.requires_grad)
    filled.__dict__.update(parameter.__dict__)
    torch.utils.swap_tensors(parameter, filled)


def copy_weights(target: nn.Module, source: nn.Module) -> None:
    """Give `target` the weights of `source`, whose names and shapes are the same; what is in files stays there."""
    theirs: dict[str, Any] = dict(source.named_parameters())
    mine: dict[str, Any] = dict(target.named_parameters())
    assert mine.keys() == theirs.keys()
    for name, parameter in mine.items():
        if theirs[name].is_meta and hasattr(theirs[name], "stored"):
            set_values(parameter, torch.empty_like(theirs[name]))
            parameter.stored = theirs[name].stored
        else:
            with torch.no_grad():
                parameter.copy_(theirs[name])


def _listed(found: Any, expected: Any) -> Any:
    """A scalar where a list of equal entries is expected means that list (published configs do both)."""
    if isinstance(expected, list) and isinstance(found, (int, str)):
        return [found] * len(expected)
    return found
