"""SANA's diffusion transformer. What other code uses of it is here."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from torch import nn

from parallel.program import Layer
from parallel.tensor import Plan
from spar_scale.models.published import PretrainedPart
from spar_scale.models.sana import layers, model, sharding, weights
from spar_scale.models.sana.shapes import DiffusionShape


class Sana(DiffusionShape):
    """A SANA diffusion transformer (role `DiffusionModel`)."""

    @property
    def plan(self) -> Plan:
        """How it is cut over tensor-parallel ranks."""
        return sharding.PLAN

    @property
    def tensor_sizes(self) -> dict[str, int]:
        """The sizes that a tensor-parallel size must divide."""
        return {name: getattr(self, name) for name in ("heads", "cross_heads", "hidden")}

    def build(self) -> nn.Module:
        """Return the model, weights uninitialised."""
        return model.Diffusion(self)

    def load(self, part: PretrainedPart) -> nn.Module:
        """Return the model with pretrained weights in the part's precision."""
        return weights.load_diffusion(part, self)

    def save(self, diffusion: nn.Module, directory: Path) -> None:
        """Write the published layout."""
        weights.save_diffusion(diffusion, directory)

    def velocity_layers(self, diffusion: nn.Module, longest: int, tap: tuple[int, Layer] | None = None) -> list[Layer]:
        """Return the way from `noisy_latent`, `timestep`, `captions` to `velocity`; a tap stands behind its block."""
        return layers.velocity_layers(cast(model.Diffusion, diffusion), longest, tap)

    def alignment_head(self, teacher_width: int) -> nn.Module:
        """Return the head from the `image_tokens` of a block to features of a teacher, weights uninitialised."""
        return model.AlignmentHead(self.width, self.align_hidden, teacher_width)
