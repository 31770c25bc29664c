"""The connector: the language model's last layers, read in both directions."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2Config, Qwen2Model

from parallel.program import Subprogram
from spar_scale.models.initialise import initialise
from spar_scale.models.internvl import Language, build_mllm
from spar_scale.models.presets import PRESETS, resized
from spar_scale.models.spar import Conditioning
from spar_scale.models.spar.connector import Connector
from spar_scale.models.spar.model import SPAR

WIDTH, CAPTIONS, QUERIES = 32, 24, 2
CONFIG = Qwen2Config(
    vocab_size=50, hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=64,
)  # fmt: skip
LANGUAGE = Language(
    width=WIDTH, layers=4, heads=4, key_value_heads=2, mlp_width=64, vocab_size=50, image_token_id=49, max_positions=64
)
SHAPE = Conditioning(num_queries=QUERIES, sampled_states=2, connector_layers=2, max_words=4)
LENGTHS = (4, 2, 1)  # of the prompts; queries follow each
WHOLE = [length + QUERIES for length in LENGTHS]


@pytest.fixture(scope="module")
def language_model() -> Qwen2Model:
    model = Qwen2Model(CONFIG)
    initialise(model, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.linspace(-0.1, 0.1, parameter.shape[-1]))  # norms and biases are not as they start
    return model.eval()


@pytest.fixture(scope="module")
def spar(language_model) -> SPAR:
    mllm: Any = SimpleNamespace(model=SimpleNamespace(language_model=language_model), lm_head=nn.Linear(WIDTH, 50))
    diffusion = resized(PRESETS["tiny"], name="narrow", diffusion={"caption_channels": CAPTIONS}).diffusion
    model = SPAR(SHAPE, LANGUAGE, diffusion, mllm, nn.Identity(), nn.Identity())
    initialise(model.connector, seed=1)
    model.connector.copy_last_layers(LANGUAGE, language_model)
    return model


@pytest.fixture(scope="module")
def connector(spar) -> Connector:
    return spar.connector


@pytest.fixture(scope="module")
def connect(spar):
    """The last layers of the list: routed tokens (N, D) to captions (N, C)."""
    layers = SHAPE.conditioning_layers(spar, LANGUAGE, illustrated=False, longest=6)
    program = Subprogram(
        [*(layer for layer in layers if layer.derived), *layers[-SHAPE.connector_layers - 1 :]], ("captions",)
    )
    prompts = {"tokens": torch.zeros(sum(LENGTHS), dtype=torch.int64), "lengths": torch.tensor(LENGTHS)}
    return lambda hidden: program({"captions": hidden, **prompts})["captions"]


def tokens() -> Tensor:
    return torch.randn(sum(WHOLE), WIDTH, generator=torch.Generator().manual_seed(2))


def test_it_starts_as_the_last_layers_and_the_final_norm(connector, language_model):
    mine = connector.state_dict()
    for name, weight in language_model.state_dict().items():
        kind, *rest = name.split(".")
        if kind == "norm":
            assert torch.equal(mine[name], weight)
        elif kind == "layers" and int(rest[0]) >= 2:
            assert torch.equal(mine[".".join([kind, str(int(rest[0]) - 2), *rest[1:]])], weight), name
    assert set(mine) == {n for n in mine if n.startswith(("layers.0.", "layers.1.", "norm.", "projection."))}


def test_it_equals_the_library_with_the_published_additive_mask(connector, connect):
    """Published: eager attention, padding behind a dense mask with -1e5, positions that count real tokens."""
    eager = Qwen2Model(CONFIG).eval()
    eager.set_attn_implementation("eager")
    hidden = pad_sequence(list(tokens().split(WHOLE)), batch_first=True, padding_value=3.0)
    real = torch.arange(max(WHOLE)) < torch.tensor(WHOLE)[:, None]
    mask = ((1 - real.int()) * -1e5)[:, None, None, :].expand(-1, 1, max(WHOLE), -1)
    rotary = eager.rotary_emb(hidden, (real.cumsum(1) - 1).clamp_min(0))
    for mine, its in zip(connector.layers, eager.layers[:2], strict=True):
        its.load_state_dict(mine.state_dict())
        hidden = its(hidden, attention_mask=mask, position_embeddings=rotary)
    eager.norm.load_state_dict(connector.norm.state_dict())
    expected = connector.projection(eager.norm(hidden))[real]
    torch.testing.assert_close(connect(tokens()), expected, atol=1e-5, rtol=1e-5)


def test_every_token_reads_every_token_of_its_sample_and_no_other(connect):
    hidden = tokens().requires_grad_()
    out = connect(hidden)
    assert out.shape == (sum(WHOLE), CAPTIONS)
    samples = torch.repeat_interleave(torch.arange(3), torch.tensor(WHOLE))
    for sample in range(3):
        first = int((samples == sample).nonzero()[0])
        (gradient,) = torch.autograd.grad(out[first].square().sum(), hidden, retain_graph=True)
        assert ((gradient.abs().sum(-1) > 0) == (samples == sample)).all()  # also the later ones: both directions


def test_all_of_it_trains(connector, connect):
    connect(tokens()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in connector.parameters())


def test_a_connector_deeper_than_the_language_model_is_refused(language_model):
    with pytest.raises(ValueError, match="a connector of 5 layers from a model of 4"):
        Connector(LANGUAGE, language_model, 5, CAPTIONS)


def test_the_published_size():
    """Six layers of Qwen2.5-0.5B: about 90M, and the projection to 2304 channels."""
    preset = PRESETS["spar_1b"]
    with torch.device("meta"):
        trunk, _ = preset.language.parts(build_mllm(preset.vision, preset.language))
        connector = Connector(preset.language, trunk, 6, 2304)
    layer = 896 * 896 + 896 + 2 * (896 * 128 + 128) + 896 * 896 + 3 * 896 * 4864 + 2 * 896
    assert sum(p.numel() for p in connector.parameters()) == 6 * layer + 896 + 896 * 2304 + 2304
    assert 85e6 < 6 * layer < 95e6
