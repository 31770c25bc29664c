"""The discriminator: a map of logits, one per patch, high where the patch looks real (SPAR, L_GAN).

    conv 5x5 -> stages of (conv 3x3, blur and halve, group norm, LeakyReLU) -> adaptive max-pool
    -> conv 1x1 -> LeakyReLU -> conv 5x5 to one logit                  images (B, 3, S, S) -> (B, 1, h, h)

Its shape follows from the preset: the stem is as wide as the pixel autoencoder's first level, the three
stages are 1, 2 and 4 times that, and the map has at most 16 logits a side. With the published
autoencoder (128 channels) on 224 pixels this is the published discriminator: 128, 256, 512 channels,
28 x 28 positions pooled to 16 x 16. The tiny preset has 12, 24, 48 channels on 4 x 4 logits, where the
pool is the identity. Small and always fp32, it stays outside the list of layers.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_WIDTHS = (1, 2, 4)  # of the stages, in stem widths
_LARGEST_MAP = 16  # logits a side
_GROUPS, _LEAST_PER_GROUP = 32, 4  # of the group norms: 32, fewer where a group would have under 4 channels
_SLOPE = 0.1  # of the LeakyReLU below zero


class BlurDownsample(nn.Module):
    """Halve (B, C, H, W): depthwise convolution by the outer product of (1, 3, 3, 1) / 8, stride 2, zeros around it."""

    kernel: Tensor

    def __init__(self):
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(taps, taps)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Blur and take every second position."""
        channels = x.shape[1]
        return F.conv2d(x, self.kernel.expand(channels, 1, 4, 4), stride=2, padding=1, groups=channels)


class Discriminator(nn.Module):
    """A discriminator with `stem` channels for images of `image_size` pixels. Weights are uninitialised."""

    def __init__(self, stem: int, image_size: int):
        super().__init__()
        widths = (stem, *(stem * width for width in _WIDTHS))
        self.map_side = min(_LARGEST_MAP, image_size // 2 ** len(_WIDTHS))
        self.stem = nn.Conv2d(3, stem, 5, padding=2)
        self.stages = nn.ModuleList(_stage(before, after) for before, after in itertools.pairwise(widths))
        self.hidden = nn.Conv2d(widths[-1], widths[-1], 1)
        self.logits = nn.Conv2d(widths[-1], 1, 5, padding=2)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] to logits (B, 1, h, h), computed in the dtype of the weights."""
        x = _activate(self.stem(images.to(self.stem.weight.dtype)))
        for stage in self.stages:
            x = stage(x)
        x = F.adaptive_max_pool2d(x, self.map_side)
        return self.logits(_activate(self.hidden(x)))


def _stage(before: int, after: int) -> nn.Sequential:
    groups = min(_GROUPS, after // _LEAST_PER_GROUP)
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1), BlurDownsample(), nn.GroupNorm(groups, after), nn.LeakyReLU(_SLOPE)
    )


def _activate(x: Tensor) -> Tensor:
    return F.leaky_relu(x, _SLOPE)
