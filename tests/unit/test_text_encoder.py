"""The text encoder of stage 0's diffusion phase: what it reads of a prompt and what not."""

import pytest
import torch

from spar_scale.models.initialise import initialise
from spar_scale.models.presets import PRESETS
from spar_scale.stages.bootstrap_diffusion import TextEncoder

TOKENS = torch.tensor([[3, 5, 7, 9]])


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    encoder = TextEncoder(PRESETS["tiny"])
    initialise(encoder, seed=0)
    return encoder


def test_captions_have_the_width_that_the_transformer_reads(encoder):
    assert encoder(TOKENS, torch.ones_like(TOKENS)).shape == (1, 4, PRESETS["tiny"].diffusion.caption_channels)


@pytest.mark.parametrize("left", [0, 2])
def test_padding_on_either_side_changes_no_caption(encoder, left):
    padding = (left, 2 - left)
    keep = torch.nn.functional.pad(torch.ones_like(TOKENS), padding)
    padded = encoder(torch.nn.functional.pad(TOKENS, padding, value=11), keep)
    torch.testing.assert_close(padded[:, left : left + 4], encoder(TOKENS, torch.ones_like(TOKENS)))


def test_a_word_is_told_by_its_place_and_by_the_words_around_it(encoder):
    keep = torch.ones_like(TOKENS)
    captions = encoder(TOKENS, keep)
    assert not torch.allclose(encoder(TOKENS.flip(1), keep).flip(1), captions)
    assert not torch.allclose(encoder(torch.tensor([[4, 5, 7, 9]]), keep)[:, 1:], captions[:, 1:])
