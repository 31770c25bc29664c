"""The parts of SPAR by the names of their parameters, for tables by part."""

from __future__ import annotations

from collections.abc import Iterable

_PARTS = {
    "tokenizer.vision_tower": "vision",
    "tokenizer.projector": "vision",
    "vision_tower": "vision",
    "projector": "vision",
    "model.vision_tower": "vision",
    "model.multi_modal_projector": "vision",
    "initial_encoder": "teachers",
    "pixel_encoder": "teachers",
    "teacher": "teachers",
    "tokenizer": "tokenizer",
    "semantic_stream": "tokenizer",
    "pixel_stream": "tokenizer",
    "fusion": "tokenizer",
    "encoder": "pixel autoencoder",
    "decoder": "pixel autoencoder",
    "language_model": "language",
    "model": "language",
    "lm_head": "language",
    "words": "text encoder",
    "text_encoder": "text encoder",
    "queries": "connector",
    "routing": "connector",
    "connector": "connector",
    "diffusion": "diffusion",
    "alignment_head": "alignment",
}


def part_of(parameters: Iterable[str]) -> str:
    """The part that a layer with these parameters belongs to: that of the longest name; without any, the losses'."""
    matches = [
        (len(prefix), part)
        for name in parameters
        for prefix, part in _PARTS.items()
        if name == prefix or name.startswith(f"{prefix}.")
    ]
    return max(matches)[1] if matches else "losses"
