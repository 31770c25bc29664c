"""Files of the perceptual networks with weights from seeds, in their published layouts and under their names."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from spar_scale.objectives.perceptual import PerceptualDistance

NAMES = {"vgg16": "vgg16-397923af.pth", "lpips": "vgg.pth", "convnext_small": "convnext_small-0c510722.pth"}


def seeded_network(convnext: bool = True) -> PerceptualDistance:
    """Return the networks with weights of plausible sizes, each from its own seed: its place from the last name on."""
    network = PerceptualDistance(convnext)
    for index, (name, weight) in enumerate(sorted(network.state_dict().items(), reverse=True)):
        drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(index))
        if name.startswith("lpips"):
            weight.copy_(drawn.abs())
        elif "layer_scale" in name:
            weight.copy_(0.3 * drawn)
        elif weight.dim() == 1:
            weight.copy_(0.1 * drawn + (1.0 if name.endswith("weight") else 0.0))
        else:
            weight.copy_(drawn * (2 / weight[0].numel()) ** 0.5)
    return network


def write_perceptual(directory: Path, network: nn.Module | None = None, convnext: bool = True) -> Path:
    """Write the files of a network, by default of `seeded_network`."""
    network = network or seeded_network(convnext)
    directory.mkdir(parents=True, exist_ok=True)
    for name, file in NAMES.items():
        if name == "convnext_small" and not convnext:
            continue
        weights = network.get_submodule(name).state_dict()
        if name == "vgg16":
            weights = {**weights, "classifier.0.weight": torch.zeros(2, 2)}  # published, and not used
        torch.save(weights, directory / file)
    return directory
