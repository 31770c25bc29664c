"""Cross-entropy of the next token, one value per sample."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def next_token_loss(logits: Tensor, tokens: Tensor, counts: Tensor) -> Tensor:
    """Return the mean cross-entropy (B,), fp32, of each sample's counted tokens; logits (B, T, V), tokens (B, T).

    `counts` (B, T) is nonzero where a token is to be predicted from those before it; a sample that counts none
    has loss 0. The first token is never predicted.
    """
    each = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), tokens[:, 1:], reduction="none")
    counted = counts[:, 1:].float()
    return (each * counted).sum(1) / counted.sum(1).clamp_min(1)
