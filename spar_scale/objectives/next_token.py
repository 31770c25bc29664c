"""Cross-entropy of the next token, one value per sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spar_scale.ops.packing import sample_of


def next_token_loss(logits: Tensor, tokens: Tensor, counts: Tensor, lengths: Tensor) -> Tensor:
    """Return the mean cross-entropy (B,), fp32, of each sample's counted tokens.

    logits (T, V), tokens (T,) and counts (T,) are those of all samples, of these lengths (B,). `counts` is nonzero
    where a token is to be predicted from those before it; a sample that counts none has loss 0. The first token of a
    sample is never predicted.
    """
    samples = sample_of(lengths, len(tokens))
    each = F.cross_entropy(logits[:-1].float(), tokens[1:], reduction="none")
    counted = counts[1:].float() * (samples[1:] == samples[:-1])
    # A sum over all tokens for each sample: a scatter would add in another order each time on CUDA.
    of_sample = (samples[1:] == torch.arange(len(lengths), device=tokens.device)[:, None]) * counted
    return (of_sample * each).sum(1) / of_sample.sum(1).clamp_min(1)
