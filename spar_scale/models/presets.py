"""Named shapes of the models.

Every number that decides a parameter's shape stands here and nowhere else, so two runs that name the
same preset have interchangeable weights.

`tiny` divides by tensor 2 and pipeline 2 (even heads, at least four layers where layers are cut). Its
vision tower takes patches of 8 pixels, one for each of its 16 tokens: patches of 4 folded 2 x 2 by the
pixel shuffle, as the published tower does it, gave the tokenizer 0.6 dB more after 200 steps of its
first phase and cost every phase that reads pictures four times the tokens. Its language model starts
wider than the published, and its words at deviation 1, as the queries do: begun at 0.05 they are drowned by what its
first layer writes (docs/demo.md). Its connector starts from the
seed: layers copied from a language model of a thousand steps expect a residual stream some thirty times as
large as what the routing hands over, and drew less than half of the prompts that new ones drew (80 steps).

`tiny_48` is the same at 48 pixels: 36 tokens and latent positions in place of 16.

`spar_1b` and `spar_3b` are the published parts, number by number, so their weights load by name and
shape: InternVL3-1B or 2B (an InternViT-300M at 448 pixels, Qwen2.5-0.5B or 1.5B with an untied head),
the DC-AE f32c32 of SANA, and SANA 0.6B or 1.6B at 512 pixels. In between stand the paper's streams,
routing, connector and alignment head. A prompt has at most 767 tokens and `<img>`, so that with the 256
queries it has 1024; the picture to edit comes on top. SPAR-3B's own streams, routing and connector are
not published: they keep SPAR-1B's depths and heads.
"""

from __future__ import annotations

from dataclasses import replace

from spar_scale.models.shapes import (
    AutoencoderShape,
    ConditioningShape,
    DiffusionShape,
    LanguageShape,
    Preset,
    SamplingShape,
    StreamShape,
    VisionShape,
)

TINY = Preset(
    name="tiny",
    image_size=32,
    vision=VisionShape(image_size=32, patch_size=8, width=128, layers=4, heads=4, mlp_width=512, downsample_ratio=1.0),
    autoencoder=AutoencoderShape(
        latent_channels=32,
        channels=(12, 24, 96, 96),
        encoder_layers=(0, 1, 1, 2),
        decoder_layers=(0, 1, 1, 2),
        encoder_blocks=("ResBlock",) * 4,
        decoder_blocks=("ResBlock",) * 4,
        multiscales=((),) * 4,
    ),
    streams=StreamShape(width=128, residual_blocks=3, pixel_layers=6, pixel_heads=4, fusion_residual=True),
    language=LanguageShape(
        layers=8,
        heads=4,
        key_value_heads=2,
        mlp_width=512,
        vocab_size=72,
        image_token_id=65,
        max_positions=128,
        rope_theta=1e4,
        initializer_range=0.05,
        word_range=1.0,
    ),
    conditioning=ConditioningShape(
        num_queries=16, sampled_states=4, connector_layers=2, max_words=14, connector_copies=False
    ),
    diffusion=DiffusionShape(
        latent_channels=32,
        sample_size=4,
        layers=6,
        heads=6,
        head_width=32,
        cross_heads=6,
        cross_head_width=32,
        caption_channels=128,
        align_hidden=192,
        interpolation_scale=0.2,
        gate_offset=0.5,
        zero_output=True,
    ),
    sampling=SamplingShape(steps=16, guidance=2.5, flow_shift=1.0),
)

TINY_48 = replace(
    TINY,
    name="tiny_48",
    image_size=48,
    vision=replace(TINY.vision, image_size=48),
    conditioning=replace(TINY.conditioning, num_queries=36),
    diffusion=replace(TINY.diffusion, sample_size=6),
)

SPAR_1B = Preset(
    name="spar_1b",
    image_size=448,
    vision=VisionShape(
        image_size=448, patch_size=14, width=1024, layers=24, heads=16, mlp_width=4096, downsample_ratio=0.5
    ),
    autoencoder=AutoencoderShape(
        latent_channels=32,
        channels=(128, 256, 512, 512, 1024, 1024),
        encoder_layers=(2, 2, 2, 3, 3, 3),
        decoder_layers=(3, 3, 3, 3, 3, 3),
        encoder_blocks=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        decoder_blocks=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        multiscales=((), (), (), (5,), (5,), (5,)),
        downsample="Conv",  # as the published config spells it
        upsample="interpolate",
        scaling_factor=0.41407,
    ),
    streams=StreamShape(width=896, residual_blocks=3, pixel_layers=6, pixel_heads=16),
    language=LanguageShape(
        layers=24,
        heads=14,
        key_value_heads=2,
        mlp_width=4864,
        vocab_size=151674,
        image_token_id=151667,
        max_positions=32768,
        rope_factor=2.0,
    ),
    conditioning=ConditioningShape(num_queries=256, sampled_states=4, connector_layers=6, max_words=768),
    diffusion=DiffusionShape(
        latent_channels=32,
        sample_size=16,
        layers=28,
        heads=36,
        head_width=32,
        cross_heads=16,
        cross_head_width=72,
        caption_channels=2304,
        align_hidden=2048,
    ),
    sampling=SamplingShape(steps=20, guidance=4.5, flow_shift=3.0),
)

SPAR_3B = replace(
    SPAR_1B,
    name="spar_3b",
    streams=replace(SPAR_1B.streams, width=1536),
    language=replace(SPAR_1B.language, layers=28, heads=12, mlp_width=8960),
    diffusion=replace(SPAR_1B.diffusion, layers=20, heads=70, cross_heads=20, cross_head_width=112),
)

PRESETS = {preset.name: preset for preset in (TINY, TINY_48, SPAR_1B, SPAR_3B)}
