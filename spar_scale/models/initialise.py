"""Initial weights that depend on a module's name and the seed, and on nothing else.

Every module that owns parameters is initialised under a generator of its own, keyed by (seed, name).
So the order of construction, a part left out for an ablation, or a pipeline cut changes no weight
of the parts that remain. What is given up: the published initialisations that draw all weights from
one stream cannot be reproduced number by number, only in distribution.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn

from spar_scale.models.published import set_values, shapes_only

Initialiser = Callable[[nn.Module], None]

_UNIT_NORMS = ("RMSNorm",)  # diffusers' class has no reset of its own: weight 1, bias 0


def initialise(model: nn.Module, seed: int, loaded: Collection[str] = ()) -> None:
    """Initialise every parameter of `model` in place, on CPU; the global generator is left as it was.

    The top-level parts named in `loaded` keep the weights that they were read with, as does what is still in
    files. What has no values yet gets memory, except where only shapes are wanted.

    A module is initialised by `_init_weights` of the nearest module around it that has one (that is
    transformers' hook; our parts define it too), else by its own `reset_parameters`. Raises
    TypeError, naming the class, for a module whose parameters no rule sets.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for name, module, initialiser in _owners(model):
            if name.split(".")[0] in loaded:
                continue
            own = dict(module.named_parameters(recurse=False))
            if all(parameter.is_meta for parameter in own.values()):
                if shapes_only() or any(hasattr(parameter, "stored") for parameter in own.values()):
                    continue
                for parameter in own.values():
                    set_values(parameter, torch.empty_like(parameter, device="cpu"))
            for parameter in own.values():
                if parameter.device.type != "cpu":
                    raise ValueError(f"initialise runs on CPU, {name} is on {parameter.device}")
                parameter.fill_(float("nan"))  # what a rule forgets is found below
            torch.default_generator.manual_seed(key(seed, name))
            if initialiser is not None:
                initialiser(module)
            if forgotten := [n for n, parameter in own.items() if parameter.isnan().any()]:
                raise TypeError(f"no initialisation is known for {type(module).__name__} ({name}: {forgotten})")


def key(seed: int, name: str) -> int:
    """Return the 63-bit generator seed of the module called `name`."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def trunc_normal(module: nn.Module) -> None:
    """Initialise as SPAR's streams are: linear weights truncated normal 0.02, biases 0, norms 1 and 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        module.reset_parameters()


def _owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, Initialiser | None]]:
    """Yield (name, module, initialiser or None) for each module that owns parameters, outermost first."""

    def walk(
        name: str, module: nn.Module, hook: Initialiser | None
    ) -> Iterator[tuple[str, nn.Module, Initialiser | None]]:
        hook = getattr(module, "_init_weights", hook)
        if next(module.parameters(recurse=False), None) is not None:
            yield name, module, hook or _own_rule(module)
        for child_name, child in module.named_children():
            yield from walk(f"{name}.{child_name}" if name else child_name, child, hook)

    yield from walk("", model, None)


def _own_rule(module: nn.Module) -> Initialiser | None:
    if hasattr(module, "reset_parameters"):
        return _reset
    if type(module).__name__ in _UNIT_NORMS:
        return _unit_norm
    return None


def _reset(module: nn.Module) -> None:
    reset: Any = module.reset_parameters
    reset()


def _unit_norm(module: nn.Module) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        parameter.fill_(1.0 if name == "weight" else 0.0)
