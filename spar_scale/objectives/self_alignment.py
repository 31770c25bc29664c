"""Self-alignment (SPAR, L_align): aligns features inside the diffusion transformer with those of the clean image.

The student is the output of a transformer block after the alignment head. The teacher are the tokenizer's projected
features f_v of the clean target. The tokens of both are in raster order.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def self_alignment(student: Tensor, teacher: Tensor) -> Tensor:
    """Return minus the mean cosine over tokens, (B,) in fp32; student (B, N, D), teacher (B, M, D).

    A teacher with another number of tokens is averaged in raster order to N tokens, as in the published code. The
    teacher gets no gradient.
    """
    teacher = teacher.detach().float()
    if teacher.shape[1] != student.shape[1]:
        teacher = F.adaptive_avg_pool1d(teacher.transpose(1, 2), student.shape[1]).transpose(1, 2)
    return -F.cosine_similarity(student.float(), teacher, dim=-1).mean(dim=1)
