"""SANA in pieces: equal to the class's own forward, with its tap and initial weights."""

import dataclasses

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0, SanaTransformer2DModel
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from parallel.program import Apply, Subprogram
from spar_scale.models.initialise import initialise
from spar_scale.models.sana.layers import velocity_layers
from spar_scale.models.sana.model import AlignmentHead, CrossAttention, Diffusion, DiffusionInput, DiffusionOutput
from spar_scale.models.sana.shapes import DiffusionShape
from spar_scale.ops.packing import cumulative

SHAPE = DiffusionShape(
    latent_channels=4, sample_size=4, layers=3, heads=4, head_width=8, cross_heads=2, cross_head_width=16,
    caption_channels=24, align_hidden=40, interpolation_scale=0.2, gate_offset=0.5,
)  # fmt: skip
LENGTHS = (5, 3)
BOUNDS = cumulative(torch.tensor(LENGTHS))


def built(**changes) -> Diffusion:
    diffusion = Diffusion(dataclasses.replace(SHAPE, **changes))
    initialise(diffusion, seed=0)
    return diffusion


@pytest.fixture(scope="module")
def diffusion() -> Diffusion:
    return built()


def batch(side: int = 4):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, side, side, generator=generator)
    return latents, torch.tensor([900.0, 37.0]), torch.randn(sum(LENGTHS), 24, generator=generator)


def own_forward(transformer: SanaTransformer2DModel, latents, timestep, captions) -> torch.Tensor:
    """One sample after another: the class itself takes no captions of different lengths without padding."""
    samples = zip(latents.split(1), captions.split(LENGTHS), timestep.split(1), strict=True)
    return torch.cat([transformer(z, c[None], t, return_dict=False)[0] for z, c, t in samples])


def padded_forward(transformer: SanaTransformer2DModel, latents, timestep, captions) -> torch.Tensor:
    padded = pad_sequence(list(captions.split(LENGTHS)), batch_first=True, padding_value=7.0)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).float()
    return transformer(latents, padded, timestep, encoder_attention_mask=mask, return_dict=False)[0]


def stock_of(diffusion: Diffusion) -> SanaTransformer2DModel:
    """The class as diffusers builds it, with its own attention and the same weights."""
    stock = SanaTransformer2DModel(**diffusion.shape.config())
    processors = {type(module.processor) for module in stock.modules() if isinstance(module, Attention)}
    assert SanaAttnProcessor2_0 in processors and CrossAttention not in processors
    stock.load_state_dict(diffusion.transformer.state_dict(), strict=True)
    return stock


def slots_of(latents, timestep, captions) -> dict[str, torch.Tensor]:
    return {"noisy_latent": latents, "timestep": timestep, "captions": captions, "caption_bounds": BOUNDS}


def predicted(diffusion: Diffusion, *given) -> torch.Tensor:
    """The velocity by the list of layers."""
    return Subprogram(velocity_layers(diffusion, max(LENGTHS)), ("velocity",))(slots_of(*given))["velocity"]


@pytest.mark.parametrize("changes", [{}, {"patch_size": 2}, {"interpolation_scale": None}])
def test_the_list_equals_the_own_forward_of_the_class(changes):
    diffusion = built(**changes)
    velocity, stock = predicted(diffusion, *batch()), stock_of(diffusion)
    assert velocity.shape == (2, 4, 4, 4)
    torch.testing.assert_close(velocity, own_forward(stock, *batch()), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(velocity, padded_forward(stock, *batch()), atol=1e-5, rtol=1e-5)


def test_the_gradients_are_those_of_the_own_forward(diffusion):
    stock = stock_of(diffusion)
    pieces = torch.autograd.grad(predicted(diffusion, *batch()).square().sum(), list(diffusion.parameters()))
    own = torch.autograd.grad(own_forward(stock, *batch()).square().sum(), list(stock.parameters()))
    for one, other in zip(pieces, own, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm() + 1e-6  # the keys' biases have no gradient but rounding


@pytest.mark.parametrize("block", [1, 2, 3])
def test_a_tap_reads_the_output_of_the_block_counted_from_one(diffusion, block):
    seen = []
    module = diffusion.transformer.transformer_blocks[block - 1]
    handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    tap = Apply(torch.clone, ("image_tokens",), "tapped")
    layers = velocity_layers(diffusion, max(LENGTHS), (block, tap))
    found = Subprogram(layers, ("velocity", "tapped"))(slots_of(*batch()))
    handle.remove()
    assert torch.equal(found["tapped"], seen[0]) and found["tapped"].shape == (2, 16, 32)
    assert torch.equal(found["velocity"], predicted(diffusion, *batch()))


@pytest.mark.parametrize("block", [0, 4])
def test_a_tap_that_is_no_block_is_refused(diffusion, block):
    with pytest.raises(ValueError, match=f"block {block} cannot be tapped, the blocks are 1 to 3"):
        velocity_layers(diffusion, 5, (block, Apply(torch.clone, ("image_tokens",), "tapped")))


def test_a_picture_reads_the_captions_of_its_sample_alone(diffusion):
    latents, timestep, captions = batch()
    changed = captions.clone()
    changed[7] = 7.0  # the last of the second sample
    velocity, other = (predicted(diffusion, latents, timestep, given) for given in (captions, changed))
    assert torch.equal(other[0], velocity[0]) and not torch.equal(other[1], velocity[1])


def test_positions_tell_places_apart_only_when_asked_for():
    """With every latent alike, the tokens after the input differ exactly where there are positions."""
    _, timestep, captions = batch()
    for scale, apart in ((0.2, True), (None, False)):
        diffusion = built(interpolation_scale=scale)
        tokens = DiffusionInput(diffusion.transformer)(torch.ones(2, 4, 4, 4), timestep, captions)[0]
        assert (tokens.std(dim=1).max().item() > 0.1) is apart


def test_gates_start_open_and_the_output_at_zero_when_asked_for():
    plain, opened, shut = built(gate_offset=0.0), built(), built(zero_output=True)
    expected = torch.tensor([0, 0, 0.5, 0, 0, 0.5])[:, None].expand(3, 6, 32)
    torch.testing.assert_close(block_tables(opened) - block_tables(plain), expected)
    assert block_tables(plain).std().item() == pytest.approx(32**-0.5, rel=0.15)
    assert predicted(shut, *batch()).abs().max() == 0 < predicted(plain, *batch()).abs().max()


def block_tables(diffusion: Diffusion) -> torch.Tensor:
    parameters = diffusion.transformer.named_parameters()
    return torch.stack([p.detach() for name, p in parameters if name.endswith(".scale_shift_table")])


def test_the_pieces_hold_the_parameters_they_use_themselves(diffusion):
    """Under ZeRO-3 a parameter is there only while the module that holds it runs."""
    pieces = [DiffusionInput(diffusion.transformer), DiffusionOutput(diffusion.transformer)]
    held = {id(p) for piece in (*pieces, *diffusion.transformer.transformer_blocks) for p in piece.parameters()}
    assert held == {id(p) for p in diffusion.parameters()}


def test_the_published_layout_goes_out_and_comes_back(diffusion, tmp_path):
    diffusion.transformer.save_pretrained(str(tmp_path))
    loaded = SanaTransformer2DModel.from_pretrained(str(tmp_path), low_cpu_mem_usage=False)
    assert isinstance(loaded, SanaTransformer2DModel)
    for name, weight in diffusion.transformer.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_the_alignment_head_and_its_size():
    head = AlignmentHead(32, SHAPE.align_hidden, 16)
    initialise(head, seed=0)
    assert [type(module) for module in head] == [nn.Linear, nn.SiLU, nn.Linear, nn.SiLU, nn.Linear]
    assert head(torch.zeros(2, 16, 32)).shape == (2, 16, 16)
    assert sum(p.numel() for p in head.parameters()) == 32 * 40 + 40 + 40 * 40 + 40 + 40 * 16 + 16
