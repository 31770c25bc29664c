"""Reconstruction objectives: one fp32 value per sample, the mean over the sample's own elements.

`gradient_difference` replaces the perceptual distance of the published recipe, which needs a pretrained network. It
compares edges at several scales; it does not model perception.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mean_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared difference of each sample, (B, ...) to (B,) in fp32.

    L_MSE on images in [0, 1], and L_p on latents (SPAR, tokenizer objectives).
    """
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


GREY_LEVEL = 1 / 255
"""One step of an 8-bit image in [0, 1]."""


def gradient_difference(prediction: Tensor, target: Tensor, scales: int = 3) -> Tensor:
    """Return the mean smooth absolute difference of image gradients over scales, (B, C, H, W) to (B,) in fp32.

    At scale s both images are averaged over 2^s x 2^s pixels. The gradients are differences of neighbours along x and
    along y; the means over both axes and all scales are averaged. Below one grey level the difference counts
    quadratically: in flat regions, rounding would flip the sign of an absolute value's gradient, and the losses would
    depend on the order of sums. Raises ValueError if an image is too small for the number of scales.
    """
    difference = prediction.float() - target.float()  # averaging and differences are linear
    if min(difference.shape[-2:]) < 2**scales:
        raise ValueError(f"{tuple(difference.shape[-2:])} pixels are too few for {scales} scales")
    values = []
    for scale in range(scales):
        if scale:
            difference = F.avg_pool2d(difference, 2)
        values.append((_smooth(difference.diff(dim=-1)) + _smooth(difference.diff(dim=-2))) / 2)
    return sum(values[1:], values[0]) / scales


def latent_power(latents: Tensor, limit: float = 1.0) -> Tensor:
    """Return how far each latent's mean square exceeds `limit`, (B, ...) to (B,) in fp32.

    Prevents an autoencoder that is trained with latent noise of fixed size from scaling its latents up.
    """
    return (latents.float().square().flatten(1).mean(1) - limit).clamp_min(0)


def _smooth(difference: Tensor) -> Tensor:
    flat = difference.flatten(1)
    return F.smooth_l1_loss(flat, torch.zeros_like(flat), beta=GREY_LEVEL, reduction="none").mean(1)
