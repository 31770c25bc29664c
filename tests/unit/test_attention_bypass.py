"""No softmax attention of a model goes around `ops/attention.py`: every softmax that torch computes is watched."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0
from spar_scale.models.conditioning import sampled_hidden_states
from spar_scale.models.connector import Connector
from spar_scale.models.diffusion import Diffusion
from spar_scale.models.mllm import build_mllm, mllm_config
from spar_scale.models.tokenizer import UnifiedTokenizer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config

from spar_scale.models.initialise import initialise
from spar_scale.models.presets import PRESETS
from spar_scale.ops.attention import attention

Run = Callable[[Any], object]
TINY = PRESETS["tiny"]
WIDTH = TINY.streams.width


class Watch(TorchDispatchMode):
    """Counts what torch computes of softmax and attention: within `attention`, and elsewhere by name."""

    def __init__(self) -> None:
        super().__init__()
        self.within = 0
        self.elsewhere: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(word in func.name() for word in ("softmax", "attention", "transformer_encoder")):
            frame = sys._getframe()
            while frame is not None and frame.f_code is not attention.__code__:
                frame = frame.f_back
            if frame is None:
                self.elsewhere.append(func.name())
            else:
                self.within += 1
        return func(*args, **(kwargs or {}))


def images() -> torch.Tensor:
    return torch.rand(1, 3, TINY.image_size, TINY.image_size, generator=torch.Generator().manual_seed(0))


def made(model: nn.Module) -> nn.Module:
    initialise(model, seed=0)
    return model.eval()


def tokenizer() -> tuple[nn.Module, Run, int]:
    """The vision tower, and the pixel stream's Transformer layers."""
    model = made(UnifiedTokenizer(TINY))
    return model, lambda model: model.encode(images()), TINY.vision.layers + TINY.streams.pixel_layers


def language() -> tuple[nn.Module, Run, int]:
    """The vision tower and Qwen2 by the class's own forward."""
    tokens = torch.full((1, TINY.vision.grid**2 + 4), TINY.language.image_token_id)
    tokens[:, :4] = 5
    run = lambda model: model(input_ids=tokens, pixel_values=images())  # noqa: E731
    return made(build_mllm(TINY)), run, TINY.vision.layers + TINY.language.layers


def conditioning() -> tuple[nn.Module, Run, int]:
    """A frozen prefix and queries: each layer attends twice."""
    keep = torch.tensor([[1, 1, 0], [1, 1, 1]])
    prefix, queries = torch.randn(2, 3, WIDTH), torch.randn(2, 4, WIDTH)
    run = lambda model: sampled_hidden_states(model.language_model, prefix, queries, keep, (0, 1))  # noqa: E731
    return made(build_mllm(TINY).model), run, 2 * TINY.language.layers


def connector() -> tuple[nn.Module, Run, int]:
    """The bidirectional layers between language model and diffusion transformer."""
    config = mllm_config(TINY).text_config
    assert isinstance(config, Qwen2Config)
    model = made(Connector(config, TINY.conditioning.connector_layers, TINY.diffusion.caption_channels))
    keep = torch.tensor([[1, 1, 0], [1, 1, 1]])
    return model, lambda model: model(torch.randn(2, 3, WIDTH), keep), TINY.conditioning.connector_layers


def diffusion() -> tuple[nn.Module, Run, int]:
    """SANA's cross-attention; its self-attention is linear and has no softmax."""
    shape = TINY.diffusion
    latents = torch.randn(2, shape.latent_channels, shape.sample_size, shape.sample_size)
    captions, keep = torch.randn(2, 3, shape.caption_channels), torch.tensor([[1, 1, 0], [1, 1, 1]])
    run = lambda model: model(latents, torch.tensor([9.0, 500.0]), captions, keep)  # noqa: E731
    return made(Diffusion(shape)), run, shape.layers


MODELS = (tokenizer, language, conditioning, connector, diffusion)


def watched(model: nn.Module, run: Run) -> Watch:
    with Watch() as watch:
        run(model)
    return watch


@pytest.mark.parametrize("model_of", MODELS, ids=lambda function: function.__name__)
def test_every_softmax_of_a_model_is_computed_by_the_one_entry_point(model_of):
    model, run, layers = model_of()
    watch = watched(model, run)
    assert watch.elsewhere == []
    assert watch.within == layers


def by_torchs_own_choice(model: Any) -> None:
    model.vision_tower.set_attn_implementation("sdpa")


def by_plain_products(model: Any) -> None:
    model.language_model.set_attn_implementation("eager")


def by_diffusers(model: Any) -> None:
    for block in model.transformer.transformer_blocks:
        block.attn2.set_processor(SanaAttnProcessor2_0())


def by_a_module_of_torch(model: Any) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, batch_first=True).eval()
    model.norm.register_forward_hook(lambda module, args, output: layer(output))


BYPASSES = [
    (tokenizer, by_torchs_own_choice, "aten::_scaled_dot_product_flash_attention_for_cpu"),
    (language, by_plain_products, "aten::_softmax"),
    (diffusion, by_diffusers, "aten::_scaled_dot_product_flash_attention_for_cpu"),
    (connector, by_a_module_of_torch, "aten::_transformer_encoder_layer_fwd"),
]


@pytest.mark.parametrize(("model_of", "bypass", "expected"), BYPASSES, ids=lambda value: getattr(value, "__name__", ""))
@torch.no_grad()
def test_the_watch_sees_a_bypass(model_of, bypass, expected: str):
    model, run, _ = model_of()
    bypass(model.model if model_of is language else model)
    assert set(watched(model, run).elsewhere) == {expected}
