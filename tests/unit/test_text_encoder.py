"""The text encoder of stage 0's diffusion phase: what it reads of a prompt and what not."""

import pytest
import torch

from spar_scale.models.initialise import initialise
from spar_scale.models.presets import PRESETS
from spar_scale.stages.bootstrap_diffusion import TextEncoder

TOKENS, LENGTHS = torch.tensor([3, 5, 7, 9]), torch.tensor([4])


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    encoder = TextEncoder(PRESETS["tiny"])
    initialise(encoder, seed=0)
    return encoder


def test_captions_have_the_width_that_the_transformer_reads(encoder):
    assert encoder(TOKENS, LENGTHS).shape == (4, PRESETS["tiny"].diffusion.caption_channels)


def test_a_caption_is_the_same_alone_and_between_others(encoder):
    together = encoder(torch.cat([torch.tensor([11, 2]), TOKENS, torch.tensor([8])]), torch.tensor([2, 4, 1]))
    torch.testing.assert_close(together[2:6], encoder(TOKENS, LENGTHS))


def test_a_word_is_told_by_its_place_and_by_the_words_around_it(encoder):
    captions = encoder(TOKENS, LENGTHS)
    assert not torch.allclose(encoder(TOKENS.flip(0), LENGTHS).flip(0), captions)
    assert not torch.allclose(encoder(torch.tensor([4, 5, 7, 9]), LENGTHS)[1:], captions[1:])
