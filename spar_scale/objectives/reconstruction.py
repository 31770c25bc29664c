"""Reconstruction objectives: one fp32 value per sample, the mean over the sample's own elements.

`gradient_difference` stands where the published recipe has a perceptual distance on a pretrained
network. No such weights are assumed here, so it is named for what it computes: it rewards edges in
the right place at several scales and knows nothing of perception.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def mean_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared difference of each sample, (B, ...) to (B,) in fp32.

    L_MSE on images in [0, 1], and L_p on latents (SPAR, tokenizer objectives).
    """
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def gradient_difference(prediction: Tensor, target: Tensor, scales: int = 3) -> Tensor:
    """Return the mean absolute difference of image gradients over scales, (B, C, H, W) to (B,) in fp32.

    At scale s both images are averaged over 2^s x 2^s pixels; the gradients are differences of
    neighbours along x and along y; the means over both axes and all scales are averaged.
    Raises ValueError where an image is too small for the number of scales.
    """
    difference = prediction.float() - target.float()  # averaging and differences are linear
    if min(difference.shape[-2:]) < 2**scales:
        raise ValueError(f"{tuple(difference.shape[-2:])} pixels are too few for {scales} scales")
    values = []
    for scale in range(scales):
        if scale:
            difference = F.avg_pool2d(difference, 2)
        along_x = difference.diff(dim=-1).abs().flatten(1).mean(1)
        along_y = difference.diff(dim=-2).abs().flatten(1).mean(1)
        values.append((along_x + along_y) / 2)
    return sum(values[1:], values[0]) / scales


def latent_power(latents: Tensor, limit: float = 1.0) -> Tensor:
    """Return how far each latent's mean square exceeds `limit`, (B, ...) to (B,) in fp32.

    Keeps an autoencoder trained with latent noise of a fixed size from outgrowing the noise.
    """
    return (latents.float().square().flatten(1).mean(1) - limit).clamp_min(0)
