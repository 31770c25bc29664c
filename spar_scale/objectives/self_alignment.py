"""Self-alignment (SPAR, L_align): the diffusion transformer's tapped features follow the clean image's.

The student is the tapped block's output after the alignment head, the teacher the tokenizer's own
projected features f_v of the clean target; tokens of both are in raster order.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def self_alignment(student: Tensor, teacher: Tensor) -> Tensor:
    """Return minus the mean cosine over tokens, (B,) in fp32; student (B, N, D), teacher (B, M, D).

    A teacher with another number of tokens is averaged along its raster to N tokens, as published.
    No gradient reaches the teacher.
    """
    teacher = teacher.detach().float()
    if teacher.shape[1] != student.shape[1]:
        teacher = F.adaptive_avg_pool1d(teacher.transpose(1, 2), student.shape[1]).transpose(1, 2)
    return -F.cosine_similarity(student.float(), teacher, dim=-1).mean(dim=1)
