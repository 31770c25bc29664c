"""No softmax attention of a model goes around `ops/attention.py`: every softmax that torch computes is watched."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.program import Layer, Subprogram
from spar_scale.models.initialise import initialise
from spar_scale.models.internvl import build_mllm, training_layers
from spar_scale.models.presets import PRESETS
from spar_scale.models.spar.model import SPAR
from spar_scale.ops.attention import attention

Run = Callable[[], None]
TINY: Any = PRESETS["tiny"]
WIDTH = TINY.language.width


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


def images() -> Tensor:
    return torch.rand(1, 3, TINY.image_size, TINY.image_size, generator=torch.Generator().manual_seed(0))


def made(model: nn.Module) -> nn.Module:
    initialise(model, seed=0)
    return model.eval()


def run(layers: list[Layer], wanted: str, **slots: Tensor) -> None:
    Subprogram(layers, (wanted,))(slots)


def tokenizer() -> tuple[nn.Module, Run, int]:
    """The vision tower, and the pixel stream's Transformer layers."""
    model = made(TINY.tokenizer.build(TINY.vision, TINY.autoencoder))
    layers = [*TINY.vision.feature_layers(model, frozen=True), *TINY.tokenizer.latent_layers(model)]
    number = TINY.vision.layers + TINY.tokenizer.pixel_layers
    return model, lambda: run(layers, "tokenizer_latent", images=images()), number


def language() -> tuple[nn.Module, Run, int]:
    """The vision tower and the language model on a prompt with a picture, as they train."""
    tokens = torch.full((TINY.vision.tokens + 4,), TINY.language.image_token_id)
    tokens[:4] = 5
    prompt = {"tokens": tokens, "lengths": torch.tensor([len(tokens)])}
    model = made(build_mllm(TINY.vision, TINY.language))
    seeing, reading = training_layers(model, TINY.vision, TINY.language)
    number = TINY.vision.layers + TINY.language.layers
    return model, lambda: run([*seeing, *reading], "logits", images=images(), **prompt), number


def decoding() -> tuple[nn.Module, Run, int]:
    """One further token of the language model, past two kept ones."""
    model = made(build_mllm(TINY.vision, TINY.language))
    layers = TINY.language.decoding_layers(*TINY.language.parts(model))
    shape = (2, TINY.language.key_value_heads, WIDTH // TINY.language.heads)
    kept = {name: torch.randn(shape) for layer in layers for name in layer.reads if name.startswith("prefix_")}
    token, position = torch.tensor([5]), torch.tensor([2])
    return model, lambda: run(layers, "logits", token=token, position=position, **kept), TINY.language.layers


def conditioning() -> tuple[nn.Module, Run, int]:
    """A frozen prompt and queries, for which each layer attends twice, and the connector's bidirectional layers."""
    mllm, shape = build_mllm(TINY.vision, TINY.language), TINY.conditioning
    spar = SPAR(shape, TINY.language, TINY.diffusion, mllm, nn.Identity(), nn.Identity(), routing="uniform")
    model = made(spar)  # the gate of the dynamic routing is a softmax too, and no attention
    layers = shape.conditioning_layers(model, TINY.language, illustrated=False, longest=40)
    tokens, lengths = torch.tensor([5, 6, 5, 6, 7]), torch.tensor([2, 3])
    number = 2 * TINY.language.layers + shape.connector_layers
    return model, lambda: run(layers, "captions", tokens=tokens, lengths=lengths), number


def diffusion() -> tuple[nn.Module, Run, int]:
    """SANA's cross-attention; its self-attention is linear and has no softmax."""
    shape, model = TINY.diffusion, made(TINY.diffusion.build())
    slots = {
        "noisy_latent": torch.randn(2, shape.latent_channels, shape.sample_size, shape.sample_size),
        "timestep": torch.tensor([9.0, 500.0]),
        "captions": torch.randn(5, shape.caption_channels),
        "caption_bounds": torch.tensor([0, 2, 5]),
    }
    return model, lambda: run(shape.velocity_layers(model, 3), "velocity", **slots), shape.layers


MODELS = (tokenizer, language, decoding, conditioning, diffusion)


def watched(run: Run) -> Watch:
    with Watch() as watch:
        run()
    return watch


@pytest.mark.parametrize("model_of", MODELS, ids=lambda function: function.__name__)
def test_every_softmax_of_a_model_is_computed_by_the_one_entry_point(model_of):
    _, run, layers = model_of()
    watch = watched(run)
    assert watch.elsewhere == []
    assert watch.within == layers


def by_torchs_own_choice(model: Any) -> None:
    model.vision_tower.set_attn_implementation("sdpa")


def by_plain_products(model: Any) -> None:
    model.model.vision_tower.set_attn_implementation("eager")


class OfDiffusers:
    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask):
        context = encoder_hidden_states.expand(len(hidden_states), -1, -1)
        return SanaAttnProcessor2_0()(attn, hidden_states, context)


def by_diffusers(model: Any) -> None:
    for block in model.transformer.transformer_blocks:
        block.attn2.set_processor(OfDiffusers())


def by_a_module_of_torch(model: Any) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, batch_first=True).eval()
    model.connector.norm.register_forward_hook(lambda module, args, output: layer(output[None])[0])


BYPASSES = [
    (tokenizer, by_torchs_own_choice, "aten::_scaled_dot_product_flash_attention_for_cpu"),
    (language, by_plain_products, "aten::_softmax"),
    (diffusion, by_diffusers, "aten::_scaled_dot_product_flash_attention_for_cpu"),
    (conditioning, by_a_module_of_torch, "aten::_transformer_encoder_layer_fwd"),
]


@pytest.mark.parametrize(("model_of", "bypass", "expected"), BYPASSES, ids=lambda value: getattr(value, "__name__", ""))
@torch.no_grad()
def test_the_watch_sees_a_bypass(model_of, bypass, expected: str):
    model, run, _ = model_of()
    bypass(model)
    assert set(watched(run).elsewhere) == {expected}
