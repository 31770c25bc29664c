"""Quality of reconstructions: PSNR and SSIM, as functions of tensors.

PSNR is computed per image on [0, 1] with range 1 and averaged by the caller: the mean of PSNRs, not the PSNR of the
mean error, as in published reconstruction tables. SSIM is that of Wang et al. (2004), written in ten lines of torch to
avoid a dependency for one function.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each image in dB, (B, C, H, W) in [0, 1] to (B,).

    Equal images give infinity.
    """
    error = (prediction.float() - target.float()).square().flatten(1).mean(1)
    return -10 * torch.log10(error)


def ssim(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the structural similarity of each image, (B, C, H, W) in [0, 1] to (B,); equal images give 1.

    Gaussian windows of 11 x 11 pixels, sigma 1.5, completely inside the image; averaged over channels.
    """
    ramp = torch.exp(-0.5 * (torch.arange(-5, 6) / 1.5) ** 2)
    window = (ramp[:, None] * ramp[None, :] / ramp.sum() ** 2)[None, None]

    def mean(images: Tensor) -> Tensor:
        return F.conv2d(images.flatten(0, 1)[:, None], window).unflatten(0, prediction.shape[:2])

    x, y = prediction.float(), target.float()
    mean_x, mean_y = mean(x), mean(y)
    variances = mean(x * x) - mean_x**2 + mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    small, smaller = 0.03**2, 0.01**2
    similar = (2 * mean_x * mean_y + smaller) / (mean_x**2 + mean_y**2 + smaller)
    return (similar * (2 * covariance + small) / (variances + small)).flatten(1).mean(1)
