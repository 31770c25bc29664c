"""The unified tokenizer's forward as layers; which of them a phase uses is said in `stages/tokenizer.py`.

Slots (B images, of which `EmbedImages` takes any leading dims, N = g * g tokens, D width, C latent channels):
    images (B, 3, S, S) in [0, 1]   hidden (B, 1 + P, W)      features f_v (B, N, D)
    semantic_latent z_s (B, N, C)   pixel_hidden (B, N, D)    pixel_latent z_p (B, N, C)
    teacher_latent (B, C, g, g)     latent z_f (B, C, g, g)   reconstruction (B, 3, S, S)
    initial_features f_v' (B, N, D)     latent_noise (B, C, g, g) standard normal
"""

from __future__ import annotations

from torch import Tensor, nn

from parallel.program import Layer
from spar_scale.models import vision
from spar_scale.models.autoencoder import encode_images
from spar_scale.models.tokenizer import Fusion, UnifiedTokenizer, to_grid
from spar_scale.objectives.distillation import semantic_distillation
from spar_scale.objectives.reconstruction import mean_squared_error


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


class InitialFeatures(Layer):
    """`images` through the frozen initial encoder to `initial_features`."""

    reads = ("images",)
    writes = ("initial_features",)
    detached = frozenset(writes)

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Encode."""
        return {"initial_features": self.encoder(images)}


class SemanticDistillation(Layer):
    """The term `semantic_distillation` (B,): L_s of `features` against `initial_features`."""

    reads = ("features", "initial_features")
    writes = ("semantic_distillation",)

    def forward(self, features: Tensor, initial_features: Tensor) -> dict[str, Tensor]:
        """Compare features."""
        return {"semantic_distillation": semantic_distillation(features, initial_features)}


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


class OneLatent(Layer):
    """The latent of the only stream, `semantic_latent` or `pixel_latent`, to `latent`."""

    writes = ("latent",)

    def __init__(self, only: str):
        super().__init__()
        self.reads = (only,)

    def forward(self, **slots: Tensor) -> dict[str, Tensor]:
        """Lay the tokens out as a grid."""
        (tokens,) = slots.values()
        return {"latent": to_grid(tokens)}


def encoder_layers(model: UnifiedTokenizer, frozen: bool) -> list[Layer]:
    """Return the way from `images` to `features`."""
    tower = model.vision_tower
    return [
        EmbedImages(tower.embeddings, frozen),
        *(VisionBlock(block, frozen) for block in tower.encoder.layer),
        ProjectFeatures(tower.layernorm, model.projector, model.downsample_ratio, frozen),
    ]


def latent_layers(model: UnifiedTokenizer) -> list[Layer]:
    """Return the way from `features` to `latent`, over the streams that exist."""
    layers: list[Layer] = []
    if model.streams != "pixel":
        layers.append(SemanticLatent(model.semantic_stream))
    if model.streams != "semantic":
        stream = model.pixel_stream
        layers += [PixelStreamLayer(layer, first=i == 0) for i, layer in enumerate(stream.layers)]
        layers.append(PixelLatent(stream.blocks, stream.head))
    return [*layers, FuseLatents(model.fusion) if model.streams == "dual" else OneLatent(f"{model.streams}_latent")]
