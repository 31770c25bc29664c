"""Register `attention` as an attention implementation of transformers.

Importing this module registers it, with transformers' own boolean masks. A model selects it with
`set_attn_implementation(IMPLEMENTATION)` or in its config.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from spar_scale.ops.attention import attention

IMPLEMENTATION = "spar"


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, is_causal: bool | None = None, dropout: float = 0.0,
    sliding_window: int | None = None, **_: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """Call `attention` with the signature of transformers, whose inputs are (B, H, N, D)."""
    if dropout or sliding_window:
        raise ValueError(f"dropout and sliding window are not supported, found {dropout} and {sliding_window}")
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal) and attention_mask is None
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return attention(q, k, v, causal=causal, mask=attention_mask, scale=scaling), None


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
