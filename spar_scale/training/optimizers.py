"""The parameter groups of the optimizer.

A learning-rate group of the training stage is split by weight decay (norms, biases, scales and embeddings have none, as
in the authors' scripts: words, positions, patches, the class token) and, for Muon, into hidden matrices and others.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from parallel.errors import UserError, nearest
from parallel.optimizers import OPTIMIZERS, WHOLE_MATRICES
from spar_scale.config.recipe import OptimizerConfig
from spar_scale.stages import Stage


def parameter_groups(stage: Stage, settings: OptimizerConfig) -> list[dict[str, Any]]:
    """Return the optimizer groups of the stage's trained parameters.

    Each group has a unique `name`, its `multiplier` of the learning rate and the optimizer's own keys. Muon's matrices
    are the weights of linear layers and full convolutions, without embeddings and the language head. Raises UserError
    for a multiplier of a group that the training stage does not have.
    """
    known = {*stage.groups, *(companion.name for companion in stage.companions)}
    if unknown := sorted(set(settings.groups) - known):
        hint = nearest(unknown[0], known)
        raise UserError(f"optimizer.groups.{unknown[0]}: this phase has the groups {sorted(known)}{hint}")
    hidden = _hidden_matrices(stage.model) if OPTIMIZERS[settings.name].matrices is not None else None
    collected: dict[tuple[str, str], list[nn.Parameter]] = {}
    for name, parameter in stage.model.named_parameters():
        group = stage.group_of(name)
        if group is not None:
            collected.setdefault((group, _kind(name, parameter, hidden)), []).append(parameter)
    return [
        {"name": f"{group}.{kind}", "params": parameters, **_keys(group, kind, settings)}
        for (group, kind), parameters in collected.items()
    ]


def _hidden_matrices(model: nn.Module) -> set[str]:
    """Return the names of hidden matrices: no depthwise convolution, no embedding, no language head."""
    names: set[str] = set()
    for name, module in model.named_modules():
        matrix = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        if matrix and "patch_embed" not in name and "lm_head" not in name:
            names.add(f"{name}.weight")
    return names


def _kind(name: str, parameter: nn.Parameter, hidden: set[str] | None) -> str:
    if hidden is not None:
        setattr(parameter, WHOLE_MATRICES, name in hidden)  # DeepSpeed reads this attribute
        if name in hidden:
            return "muon"
    embeds = "embeddings." in name or "embed_tokens" in name
    return "decay" if parameter.dim() > 1 and not embeds else "plain"


def _keys(group: str, kind: str, settings: OptimizerConfig) -> dict[str, Any]:
    multiplier = settings.groups.get(group, 1.0)
    decay = settings.weight_decay if kind != "plain" else 0.0
    if kind == "muon":
        ratio = settings.muon_lr / settings.lr
        keys = {"lr": settings.lr, "momentum": settings.muon_momentum, "weight_decay": decay, WHOLE_MATRICES: True}
        return {**keys, "multiplier": multiplier * ratio}
    keys = {"lr": settings.lr, "betas": tuple(settings.betas), "eps": settings.eps, "weight_decay": decay}
    if OPTIMIZERS[settings.name].matrices is not None:
        keys[WHOLE_MATRICES] = False
    return {**keys, "multiplier": multiplier}
