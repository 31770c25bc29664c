"""InternVL's vision tower and projector: the published classes, our attention and pixel shuffle.

Shapes: images (B, 3, S, S) in [0, 1]; hidden states (B, 1 + P, W) with the class token first;
features f_v (B, N, D), the projected tokens that the language model and both streams read.
The modules are transformers' own, so published weights fit by name. The list of layers (`layers.py`) composes the
pieces `embed`, the tower's blocks and `project`; a test holds it bit-equal to `InternVLModel.get_image_features`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from transformers import InternVLConfig, InternVLVisionConfig, InternVLVisionModel, Qwen2Config
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

from spar_scale.models.initialise import trunc_normal
from spar_scale.models.internvl.shapes import VisionShape
from spar_scale.ops.transformers_attention import IMPLEMENTATION

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VisionProjector(InternVLMultiModalProjector):
    """InternVL's mlp1 (LN -> Linear -> GELU -> Linear), with an initialisation of its own."""

    _init_weights = staticmethod(trunc_normal)


class VisionEncoder(nn.Module):
    """A vision tower and its projector, weights uninitialised."""

    def __init__(self, shape: VisionShape):
        super().__init__()
        self.vision_tower, self.projector = build_vision(shape)


def build_vision(shape: VisionShape) -> tuple[InternVLVisionModel, VisionProjector]:
    """Return a vision tower and its projector, weights uninitialised."""
    config = vision_config(shape)
    assert isinstance(config.vision_config, InternVLVisionConfig)
    tower = InternVLVisionModel(config.vision_config)
    tower.set_attn_implementation(IMPLEMENTATION)
    return tower, VisionProjector(config)


def vision_config(shape: VisionShape) -> InternVLConfig:
    """Return the InternVL config of a vision encoder; of its text part only the width is meaningful."""
    tower = InternVLVisionConfig(
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.mlp_width,
        attention_bias=shape.attention_bias,
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        layer_scale_init_value=shape.layer_scale,
    )
    text = Qwen2Config(hidden_size=shape.output_width)
    return InternVLConfig(vision_config=tower, text_config=text, downsample_ratio=shape.downsample_ratio)


def normalise(images: Tensor) -> Tensor:
    """Images in [0, 1] to ImageNet's zero mean and unit variance, in fp32."""
    mean, std = _imagenet(images.device)
    return (images.float() - mean) / std


def embed(embeddings: nn.Module, images: Tensor) -> Tensor:
    """Images (..., 3, S, S) in [0, 1] to the tower's first hidden states (B, 1 + P, W), B over all leading dims."""
    return embeddings(normalise(images).flatten(0, -4))


def project(layernorm: nn.Module, projector: nn.Module, hidden: Tensor, downsample_ratio: float) -> Tensor:
    """The tower's last hidden states (B, 1 + P, W) to features f_v (B, N, D), without the class token."""
    tokens = layernorm(hidden)[:, 1:]
    return projector(pixel_shuffle(tokens, downsample_ratio))


def pixel_shuffle(tokens: Tensor, ratio: float) -> Tensor:
    """Fold squares of neighbouring tokens into channels: (B, P, W) to (B, P * ratio^2, W / ratio^2).

    The order of the channels is InternVL's (ps_version v2), which published projectors expect.
    """
    side, factor = round(tokens.shape[1] ** 0.5), round(1 / ratio)
    squares = tokens.unflatten(1, (side // factor, factor, side // factor, factor))
    return squares.transpose(2, 3).flatten(3).flatten(1, 2)


@functools.cache
def _imagenet(device: torch.device) -> tuple[Tensor, Tensor]:
    return (
        torch.tensor(IMAGENET_MEAN, device=device).view(3, 1, 1),
        torch.tensor(IMAGENET_STD, device=device).view(3, 1, 1),
    )
