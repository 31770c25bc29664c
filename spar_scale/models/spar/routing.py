"""Dynamic Token Routing: every token chooses among the language model's layers (SPAR, section on conditioning).

Legend: K sampled hidden states, N tokens, D width of the language model, L its layers.
Routed token = W_p LN(sum_k w_k alpha_k H_k) with w = softmax(g(H_K) / tau), where H_K is the last
sampled state and g is Linear(D, D/2) -> SiLU -> Linear(D/2, K). Hidden state 0 is the embedding and L
the output of the final norm; the ones between are the raw residual stream, so their scales differ,
which alpha and LN absorb. W_p does not commute with LN: the norm comes first, as published.

The two ablations keep alpha, LN and W_p, so that only the choice of layers differs, and leave out what
they would not train: `uniform` has no gate, `last_layer` neither gate nor other states than H_L.
About 1.21M parameters at D = 896 and K = 4.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Kind = Literal["dynamic", "uniform", "last_layer"]


def sampled_states(num_layers: int, num_states: int) -> tuple[int, ...]:
    """Return the indices of the K hidden states: every floor(L / K) layers, the last one forced to L.

    Raises ValueError unless 1 <= K <= L.
    """
    if not 1 <= num_states <= num_layers:
        raise ValueError(f"{num_states} hidden states cannot be sampled from {num_layers} layers")
    interval = num_layers // num_states
    return (*(interval * k for k in range(1, num_states)), num_layers)


class TokenRouting(nn.Module):
    """Routes stacked hidden states (K, N, D) to tokens (N, D).

    `sampled` holds the indices of the hidden states to stack; it follows from `num_layers` (L),
    `num_states` (K) and `kind`. Raises ValueError for an unknown kind.
    """

    def __init__(self, width: int, num_layers: int, num_states: int, kind: Kind = "dynamic", temperature: float = 1.0):
        super().__init__()
        if kind not in ("dynamic", "uniform", "last_layer"):
            raise ValueError(f"routing '{kind}' is not one of dynamic, uniform, last_layer")
        self.sampled = (num_layers,) if kind == "last_layer" else sampled_states(num_layers, num_states)
        self.temperature = temperature
        self.gate: nn.Sequential | None = None
        if kind == "dynamic":
            self.gate = nn.Sequential(nn.Linear(width, width // 2), nn.SiLU(), nn.Linear(width // 2, len(self.sampled)))
        self.scales = nn.Parameter(torch.ones(len(self.sampled)))
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, width)

    def weights(self, states: Tensor) -> Tensor:
        """Return the routing weights (N, K) of states (K, N, D), fp32; they sum to 1 for each token."""
        if self.gate is None:
            num_states, num_tokens, _ = states.shape
            return states.new_full((num_tokens, num_states), 1 / num_states, dtype=torch.float32)
        return (self.gate(states[-1]).float() / self.temperature).softmax(dim=-1)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Map hidden states (K, N, D), in the order of `sampled`, to routed tokens (N, D) and their weights."""
        weights = self.weights(states)
        scaled = (weights * self.scales).to(states.dtype)
        return self.projection(self.norm(torch.einsum("nk,knd->nd", scaled, states))), weights

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, TokenRouting):
            nn.init.ones_(module.scales)
        elif isinstance(module, nn.Linear | nn.LayerNorm):
            module.reset_parameters()
