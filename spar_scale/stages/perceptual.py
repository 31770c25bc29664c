"""The perceptual loss by frozen networks: a term near the end of a stage's list, and the files that it is read from.

The networks stay fp32 outside the engine, on the pipeline stage that has the layer. `model.pretrained.perceptual` is a
directory with the files under their published names; nothing else takes their place.

Slots: images, reconstruction (B, 3, S, S); term perceptual (B,).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from parallel.program import Layer
from spar_scale.models.published import PretrainedPart, shapes_only
from spar_scale.objectives.perceptual import PerceptualDistance

if TYPE_CHECKING:
    from spar_scale.config.recipe import Recipe

PART = "perceptual"
FILES = {
    "vgg16": ("vgg16*", "torchvision's vgg16-397923af.pth"),
    "lpips": ("vgg", "vgg.pth of the package lpips, weights/v0.1"),
    "convnext_small": ("convnext_small*", "torchvision's convnext_small-0c510722.pth"),
}
"""Network -> the name of its file without ending, as a pattern, and where it is published."""
ENDINGS = ("pth", "pt", "safetensors")


class PerceptualLoss(Layer):
    """The term `perceptual` (B,): the distance of the reconstruction from the images."""

    reads = ("reconstruction", "images")
    writes = ("perceptual",)
    recomputes = False  # its backward pass follows at once: to compute it again would free nothing

    def __init__(self, network: PerceptualDistance):
        super().__init__()
        self.beside = (network,)

    def forward(self, reconstruction: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Compare."""
        (network,) = self.beside
        if network.mean.device != images.device:  # in the first step, on the ranks whose pipeline stage has this layer
            network.to(images.device)
        return {"perceptual": network(reconstruction, images)}


def perceptual_loss(recipe: Recipe, part: PretrainedPart) -> Layer:
    """Return the layer of `objective.perceptual`, with weights from the files of `part`.

    Raises UserError for a file that is missing, doubled, unreadable, or has other weights than the network.
    """
    network = PerceptualDistance(convnext=_has_convnext(recipe))
    if not shapes_only():
        for name, path in perceptual_files(recipe, part).items():
            _load(part, network, name, path)
    return PerceptualLoss(network)


def perceptual_files(recipe: Recipe, part: PretrainedPart) -> dict[str, Path]:
    """Return network -> its file. Raises UserError unless each network of `objective.perceptual` has exactly one."""
    found: dict[str, Path] = {}
    problems = []
    for name, (pattern, published) in FILES.items():
        if name == "convnext_small" and not _has_convnext(recipe):
            continue
        paths = [path for ending in ENDINGS for path in sorted(part.directory.glob(f"{pattern}.{ending}"))]
        if len(paths) == 1:
            found[name] = paths[0]
        else:
            names = ", ".join(path.name for path in paths) or "none"
            problems.append(f"found {names} of {pattern}.{'|'.join(ENDINGS)}, expected one file ({published})")
    if problems:
        loss = recipe.objective.perceptual
        raise part.error(f"{'; '.join(problems)} in {part.directory}; objective.perceptual {loss} needs them")
    return found


def _has_convnext(recipe: Recipe) -> bool:
    return recipe.objective.perceptual == "lpips_convnext"


def _load(part: PretrainedPart, network: PerceptualDistance, name: str, path: Path) -> None:
    """Copy the weights of a file into one of the networks."""
    try:
        # Pickles are read without their code: only tensors and plain containers are accepted.
        weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        if name == "vgg16":  # the classifier, four fifths of the file, has no part in the distance
            weights = {key: value for key, value in weights.items() if not key.startswith("classifier.")}
        network.get_submodule(name).load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError, AttributeError, TypeError, ValueError, EOFError) as error:
        raise part.error(f"{path} does not hold the weights of {name}: {' '.join(str(error).split())[:300]}") from None
    except Exception as error:  # pickle's own errors derive from Exception alone
        raise part.error(f"{path} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]})") from None
