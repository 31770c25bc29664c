"""SANA's forward as layers, from a noisy latent and captions to the velocity.

Slots (B samples, N latent positions / patch^2, W and D widths, M captions of all samples one after another, C caption
channels, Z latent channels):
    noisy_latent (B, Z, g, g)   timestep (B,) = 1000 sigma   captions (M, C)   caption_bounds (B + 1,) int64
    image_tokens (B, N, W)   context (M, W)   modulation (B, 6 W)   time (B, W)   velocity (B, Z, g, g)
"""

from __future__ import annotations

from torch import Tensor, nn

from parallel.program import Layer
from spar_scale.models.sana.model import Diffusion, DiffusionInput, DiffusionOutput, run_block
from spar_scale.ops.packing import Packing, even_bounds


class EmbedLatent(Layer):
    """The noisy latent, the time and the captions to what the blocks read."""

    reads = ("noisy_latent", "timestep", "captions")
    writes = ("image_tokens", "context", "modulation", "time")

    def __init__(self, diffusion: Diffusion):
        super().__init__()
        self.begin = DiffusionInput(diffusion.transformer)

    def forward(self, noisy_latent: Tensor, timestep: Tensor, captions: Tensor) -> dict[str, Tensor]:
        """Embed."""
        return dict(zip(self.writes, self.begin(noisy_latent, timestep, captions), strict=True))


class DiffusionBlock(Layer):
    """One block on `image_tokens`."""

    reads = ("image_tokens", "context", "caption_bounds", "modulation")
    writes = ("image_tokens",)

    def __init__(self, block: nn.Module, grid: int, longest: int):
        super().__init__()
        self.block, self.grid, self.longest = block, (grid, grid), longest

    def forward(self, image_tokens: Tensor, context: Tensor, caption_bounds: Tensor, modulation: Tensor):
        """Run the block."""
        batch, tokens, _ = image_tokens.shape
        packing = Packing(even_bounds(batch, tokens, context.device), caption_bounds, tokens, self.longest)
        return {"image_tokens": run_block(self.block, image_tokens, context, packing, modulation, self.grid)}


class PredictVelocity(Layer):
    """`image_tokens` and `time` to `velocity`."""

    reads = ("image_tokens", "time")
    writes = ("velocity",)

    def __init__(self, diffusion: Diffusion, grid: int):
        super().__init__()
        self.end, self.grid = DiffusionOutput(diffusion.transformer), (grid, grid)

    def forward(self, image_tokens: Tensor, time: Tensor) -> dict[str, Tensor]:
        """Predict."""
        return {"velocity": self.end(image_tokens, time, self.grid)}


def velocity_layers(diffusion: Diffusion, longest: int, tap: tuple[int, Layer] | None = None) -> list[Layer]:
    """Return the way from `noisy_latent` and `captions` to `velocity`; no sample has more than `longest` captions.

    `tap` is a layer with the number, from 1, of the block behind which it stands. Raises ValueError for a number that
    is no block's.
    """
    if tap is not None and not 1 <= tap[0] <= diffusion.shape.layers:
        raise ValueError(f"block {tap[0]} cannot be tapped, the blocks are 1 to {diffusion.shape.layers}")
    grid = diffusion.shape.sample_size // diffusion.shape.patch_size
    layers: list[Layer] = [EmbedLatent(diffusion)]
    for number, block in enumerate(diffusion.transformer.transformer_blocks, start=1):
        layers.append(DiffusionBlock(block, grid, longest))
        if tap is not None and number == tap[0]:
            layers.append(tap[1])
    return [*layers, PredictVelocity(diffusion, grid)]
