"""Stage 1, the unified tokenizer.

Phase `init` (SPAR, tokenizer stage I): streams and fusion learn to speak the latent of the frozen
pixel autoencoder from the features of the frozen vision tower. Loss: L_MSE + perceptual term + lambda_p
L_p, with L_p = MSE(z_p, E_p'(I)) against the frozen pixel encoder. L_p needs no semantic loss beside it.

Slots (B images, N = g * g tokens, D width, C latent channels):
    images (B, 3, S, S) in [0, 1]   hidden (B, 1 + P, W)      features f_v (B, N, D)
    semantic_latent z_s (B, N, C)   pixel_hidden (B, N, D)    pixel_latent z_p (B, N, C)
    teacher_latent (B, C, g, g)     latent z_f (B, C, g, g)   reconstruction (B, 3, S, S)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from parallel.program import Layer
from spar_scale.data.spec import SampleSpec
from spar_scale.models import vision
from spar_scale.models.autoencoder import encode_images
from spar_scale.models.initialise import initialise
from spar_scale.models.tokenizer import Fusion, UnifiedTokenizer, to_grid
from spar_scale.objectives.reconstruction import mean_squared_error
from spar_scale.stages import Stage
from spar_scale.stages.bootstrap import ReconstructionLoss
from spar_scale.stages.parts import (
    copy_weights,
    load_autoencoder,
    load_vision,
    note_random_part,
    preset_of,
    pretrained_directories,
)
from spar_scale.stages.pixel_decoder import decoder_layers


class EmbedImages(Layer):
    """`images` to the vision tower's first `hidden`; without gradient where the tower is frozen."""

    reads = ("images",)
    writes = ("hidden",)

    def __init__(self, embeddings: nn.Module, frozen: bool):
        super().__init__()
        self.embeddings, self.detached = embeddings, frozenset(self.writes if frozen else ())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Cut into patches and add positions."""
        return {"hidden": vision.embed(self.embeddings, images)}


class VisionBlock(Layer):
    """One block of the vision tower on `hidden`."""

    reads = ("hidden",)
    writes = ("hidden",)

    def __init__(self, block: nn.Module, frozen: bool):
        super().__init__()
        self.block, self.detached = block, frozenset(self.writes if frozen else ())

    def forward(self, hidden: Tensor) -> dict[str, Tensor]:
        """Run the block."""
        return {"hidden": self.block(hidden)}


class ProjectFeatures(Layer):
    """`hidden` to `features`: the tower's last norm, pixel shuffle, projector."""

    reads = ("hidden",)
    writes = ("features",)

    def __init__(self, layernorm: nn.Module, projector: nn.Module, downsample_ratio: float, frozen: bool):
        super().__init__()
        self.layernorm, self.projector, self.downsample_ratio = layernorm, projector, downsample_ratio
        self.detached = frozenset(self.writes if frozen else ())

    def forward(self, hidden: Tensor) -> dict[str, Tensor]:
        """Project."""
        return {"features": vision.project(self.layernorm, self.projector, hidden, self.downsample_ratio)}


class SemanticLatent(Layer):
    """`features` through the semantic stream to `semantic_latent`."""

    reads = ("features",)
    writes = ("semantic_latent",)

    def __init__(self, stream: nn.Module):
        super().__init__()
        self.stream = stream

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Run the stream."""
        return {"semantic_latent": self.stream(features)}


class PixelStreamLayer(Layer):
    """One Transformer layer of the pixel stream; the first reads `features`."""

    writes = ("pixel_hidden",)

    def __init__(self, layer: nn.Module, first: bool):
        super().__init__()
        self.reads = ("features",) if first else ("pixel_hidden",)
        self.layer = layer

    def forward(self, **slots: Tensor) -> dict[str, Tensor]:
        """Run the layer."""
        (hidden,) = slots.values()
        return {"pixel_hidden": self.layer(hidden)}


class PixelLatent(Layer):
    """`pixel_hidden` through the pixel stream's residual blocks and head to `pixel_latent`."""

    reads = ("pixel_hidden",)
    writes = ("pixel_latent",)

    def __init__(self, blocks: nn.Module, head: nn.Module):
        super().__init__()
        self.blocks, self.head = blocks, head

    def forward(self, pixel_hidden: Tensor) -> dict[str, Tensor]:
        """Run the blocks and the head."""
        return {"pixel_latent": self.head(self.blocks(pixel_hidden))}


class PixelTeacher(Layer):
    """`images` through the frozen pixel encoder to `teacher_latent`, on the tokens' grid."""

    reads = ("images",)
    writes = ("teacher_latent",)
    detached = frozenset(writes)

    def __init__(self, encoder: nn.Module, side: int):
        super().__init__()
        self.encoder, self.side = encoder, side

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Encode the image at the size (`side` pixels) whose latent has the tokens' grid."""
        return {"teacher_latent": encode_images(self.encoder, images, self.side)}


class PixelAlignment(Layer):
    """The term `pixel_alignment` (B,): L_p of `pixel_latent` against `teacher_latent`."""

    reads = ("pixel_latent", "teacher_latent")
    writes = ("pixel_alignment",)

    def forward(self, pixel_latent: Tensor, teacher_latent: Tensor) -> dict[str, Tensor]:
        """Compare raw latents."""
        return {"pixel_alignment": mean_squared_error(to_grid(pixel_latent), teacher_latent)}


class FuseLatents(Layer):
    """`semantic_latent` and `pixel_latent` to `latent`."""

    reads = ("semantic_latent", "pixel_latent")
    writes = ("latent",)

    def __init__(self, fusion: Fusion):
        super().__init__()
        self.fusion = fusion

    def forward(self, semantic_latent: Tensor, pixel_latent: Tensor) -> dict[str, Tensor]:
        """Fuse."""
        return {"latent": to_grid(self.fusion(semantic_latent, pixel_latent))}


def tokenizer_layers(model: UnifiedTokenizer, side: int, frozen_encoder: bool, pixel_alignment: bool) -> list[Layer]:
    """Return the tokenizer's training forward; `side` is the pixel teacher's image size in pixels."""
    tower, stream = model.vision_tower, model.pixel_stream
    alignment = [PixelTeacher(model.pixel_encoder, side), PixelAlignment()] if pixel_alignment else []
    return [
        EmbedImages(tower.embeddings, frozen_encoder),
        *(VisionBlock(block, frozen_encoder) for block in tower.encoder.layer),
        ProjectFeatures(tower.layernorm, model.projector, model.downsample_ratio, frozen_encoder),
        SemanticLatent(model.semantic_stream),
        *(PixelStreamLayer(layer, first=i == 0) for i, layer in enumerate(stream.layers)),
        PixelLatent(stream.blocks, stream.head),
        *alignment,
        FuseLatents(model.fusion),
        *decoder_layers(model.decoder, model.image_size),
        ReconstructionLoss(),
    ]


def init(recipe: Any) -> Stage:
    """Build stage `tokenizer`, phase `init`.

    Reads from the recipe: model.preset, model.pretrained.{pixel_autoencoder, mllm}, seed,
    objective.{perceptual_weight, pixel_alignment_weight}. The pixel autoencoder is required. Without
    `mllm` the frozen vision tower and projector are initialised from the seed, which is logged.
    """
    directories = pretrained_directories(recipe, ("pixel_autoencoder", "mllm"), ("pixel_autoencoder",))
    preset, objective = preset_of(recipe), recipe.objective
    model = UnifiedTokenizer(preset)
    initialise(model, recipe.seed)
    autoencoder = load_autoencoder(directories["pixel_autoencoder"], preset)
    copy_weights(model.decoder, autoencoder.decoder)
    copy_weights(model.pixel_encoder, autoencoder.encoder)
    if "mllm" in directories:
        tower, projector = load_vision(directories["mllm"], preset)
        copy_weights(model.vision_tower, tower)
        copy_weights(model.projector, projector)
    else:
        note_random_part("mllm", recipe.seed)
    aligned = objective.pixel_alignment_weight > 0
    terms = {"mean_squared_error": 1.0, "gradient_difference": objective.perceptual_weight}
    if aligned:
        terms["pixel_alignment"] = objective.pixel_alignment_weight
    side = preset.vision.grid * preset.autoencoder.compression
    return Stage(
        model=model,
        layers=tokenizer_layers(model, side, frozen_encoder=True, pixel_alignment=aligned),
        inputs=("images",),
        terms=terms,
        groups={"main": ("semantic_stream", "pixel_stream"), "fusion": ("fusion",)},
        sample=SampleSpec(task="images", image_size=preset.image_size),
        references=directories,
    )
