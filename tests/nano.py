"""A preset for tests of many processes: the tiny one with as few layers and as little width as its parts allow.

Importing this module makes it known by its name, in this process; what is true of it in kind is true of
`tiny`: the same parts, at least two of every layer, widths that divide by tensor 2.
"""

from __future__ import annotations

from spar_scale.models.presets import PRESETS, resized

NANO = resized(
    PRESETS["tiny"],
    name="nano",
    vision={
        "width": 32, "layers": 2, "heads": 2, "mlp_width": 64, "patch_size": 4, "downsample_ratio": 0.5,
        "output_width": 32,
    },
    autoencoder={"channels": (8, 16, 32, 64), "latent_channels": 8},
    tokenizer={"residual_blocks": 1, "pixel_layers": 2, "pixel_heads": 2},
    language={"width": 32, "layers": 4, "heads": 4, "key_value_heads": 2, "mlp_width": 64},
    conditioning={"sampled_states": 2, "connector_layers": 2},
    diffusion={
        "latent_channels": 8, "layers": 4, "heads": 2, "head_width": 16, "cross_heads": 2, "cross_head_width": 16,
        "caption_channels": 32, "align_hidden": 32,
    },
)  # fmt: skip
PRESETS["nano"] = NANO
