"""How the models of a preset are cut over tensor-parallel ranks, and which tensor-parallel sizes fit them.

Attention is cut by heads, a feed-forward by its hidden width, embeddings and the language head by words. What no plan
names is whole on every rank: norms, modulations, patch and time embeddings, routing, queries, fusion, heads.
"""

from __future__ import annotations

from math import gcd

from parallel.errors import UserError
from parallel.tensor import COLUMN, ROW, ModulePlan, Plan
from parallel.topology import NEAREST
from spar_scale.models.blocks import ResBlock, SelfAttention, TransformerLayer
from spar_scale.models.presets import Preset

BLOCKS: Plan = {
    SelfAttention: ModulePlan({"query": COLUMN, "key": COLUMN, "value": COLUMN, "output": ROW}),
    TransformerLayer: ModulePlan({"linear_1": COLUMN, "linear_2": ROW}),
    ResBlock: ModulePlan({"linear_1": COLUMN, "linear_2": ROW}),
}
"""The cuts of the blocks that several families use."""


def tensor_plan(preset: Preset) -> Plan:
    """Return class of module -> its cuts, for all members of a preset."""
    return {kind: cuts for plan in (BLOCKS, *(m.plan for m in preset.members.values())) for kind, cuts in plan.items()}


def check_tensor(preset: Preset, tensor: int) -> None:
    """Raise UserError, naming a size of the preset and the cuts that fit all of them, where `tensor` does not."""
    sizes = {f"{role}.{name}": size for role, m in preset.members.items() for name, size in m.tensor_sizes.items()}
    refused = [key for key, size in sizes.items() if size % tensor]
    if refused:
        common = gcd(*sizes.values())
        fits = [number for number in range(1, common + 1) if common % number == 0]
        fits.sort(key=lambda number: max(number, tensor) / min(number, tensor))
        raise UserError(
            f"parallel.tensor: found {tensor}; preset '{preset.name}' has {refused[0]} {sizes[refused[0]]}, which it"
            f" must divide; nearest that fit: {' or '.join(f'parallel.tensor={number}' for number in fits[:NEAREST])}"
        )
