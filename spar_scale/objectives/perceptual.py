"""Perceptual distances by frozen networks, for pictures in [0, 1]: one fp32 value per sample.

    LPIPS      sum over five taps of VGG16 of mean_xy(w . (f / |f| - f' / |f'|)^2)       (Zhang et al. 2018, v0.1)
    ConvNeXt   mean squared difference of the logits of ConvNeXt-S at 224 x 224 pixels

The published tokenizer adds LPIPS + 0.1 ConvNeXt to its squared error. The modules have torchvision's names, so its
files load as they are. They are written here, and torchvision is not a dependency, because it pins one version of torch
exactly: an installation would replace the user's torch. Weights are uninitialised; `stages/perceptual.py` reads them.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVNEXT_WEIGHT = 0.1
"""Weight of the ConvNeXt term beside LPIPS, in the authors' scripts."""
_CHANNELS = (64, 128, 256, 512, 512)  # of VGG16's five groups of convolutions, at whose ends LPIPS compares
_CONVOLUTIONS = (2, 2, 3, 3, 3)
_WIDTHS, _DEPTHS, _CLASSES, _SIDE = (96, 192, 384, 768), (3, 3, 27, 3), 1000, 224  # of ConvNeXt-S


class PerceptualDistance(nn.Module):
    """LPIPS, with `convnext` also the distance of ConvNeXt's logits; without gradients of its own weights."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, convnext: bool):
        super().__init__()
        self.vgg16, self.lpips = VGG16(), nn.ModuleDict({f"lin{i}": _Head(c) for i, c in enumerate(_CHANNELS)})
        self.convnext_small = ConvNeXtSmall() if convnext else None
        # ImageNet's mean and deviation; LPIPS's own scaling of pictures in [-1, 1] is the same function of the pixel.
        self.register_buffer("mean", torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) in [0, 1] twice to (B,); S is at least 16. The target gets no gradient."""
        prediction, target = prediction.float(), target.detach().float()
        value = self._lpips(prediction, target)
        if self.convnext_small is None:
            return value
        return value + CONVNEXT_WEIGHT * self.logits_distance(prediction, target)

    def logits_distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean squared difference of ConvNeXt's logits, (B, 3, S, S) twice to (B,)."""
        assert self.convnext_small is not None
        logits, wanted = (self.convnext_small(self._normalised(_to_side(images))) for images in (prediction, target))
        return (logits - wanted).square().mean(1)

    def _lpips(self, prediction: Tensor, target: Tensor) -> Tensor:
        taps = (self.vgg16(self._normalised(images)) for images in (prediction, target))
        values = [
            head((_unit(ours) - _unit(theirs)).square()).mean((1, 2, 3))
            for head, ours, theirs in zip(self.lpips.values(), *taps, strict=True)
        ]
        return torch.stack(values).sum(0)

    def _normalised(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.deviation


class VGG16(nn.Module):
    """torchvision's VGG16 up to its last activation: normalised pictures to the outputs of its five groups."""

    def __init__(self):
        super().__init__()
        layers: list[nn.Module] = []
        for before, (channels, number) in zip(
            (3, *_CHANNELS), zip(_CHANNELS, _CONVOLUTIONS, strict=True), strict=False
        ):
            for width in (before, *[channels] * (number - 1)):
                layers += [nn.Conv2d(width, channels, 3, padding=1), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> list[Tensor]:
        """Run it."""
        taps = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                taps.append(x)
            x = layer(x)
        return [*taps, x]


class ConvNeXtSmall(nn.Module):
    """torchvision's ConvNeXt-S: normalised pictures (B, 3, 224, 224) to logits (B, 1000)."""

    def __init__(self):
        super().__init__()
        stages: list[nn.Module] = [nn.Sequential(nn.Conv2d(3, _WIDTHS[0], 4, stride=4), _ChannelNorm(_WIDTHS[0]))]
        for width, depth, after in itertools.zip_longest(_WIDTHS, _DEPTHS, _WIDTHS[1:]):
            stages.append(nn.Sequential(*(_Block(width) for _ in range(depth))))
            if after is not None:
                stages.append(nn.Sequential(_ChannelNorm(width), nn.Conv2d(width, after, 2, stride=2)))
        self.features = nn.Sequential(*stages)
        last = _WIDTHS[-1]
        self.classifier = nn.Sequential(_ChannelNorm(last), nn.Flatten(1), nn.Linear(last, _CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        return self.classifier(self.features(x).mean((2, 3), keepdim=True))


class _Block(nn.Module):
    """Depthwise convolution and an MLP over channels, scaled, beside the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(width, width, 7, padding=3, groups=width),
            _Permuted(0, 2, 3, 1),
            nn.LayerNorm(width, eps=1e-6),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            _Permuted(0, 3, 1, 2),
        )
        self.layer_scale = nn.Parameter(torch.empty(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale * self.block(x)


class _Permuted(nn.Module):
    def __init__(self, *order: int):
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)


class _ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class _Head(nn.Module):
    """A head of LPIPS: a weight for each channel. The index 1 in its published name is from the dropout before it."""

    def __init__(self, channels: int):
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def _unit(features: Tensor) -> Tensor:
    """Scale features (B, C, H, W) to channels of norm 1."""
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)


def _to_side(images: Tensor) -> Tensor:
    if images.shape[-1] == _SIDE:
        return images
    return F.interpolate(images, size=(_SIDE, _SIDE), mode="bilinear", align_corners=False, antialias=True)
