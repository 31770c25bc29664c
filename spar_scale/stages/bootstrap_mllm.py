"""The losses of a vision tower and a language model that train from scratch, and their published layout.

The loss is the cross-entropy of the next token where a token is predicted (`data/prompts.py`): captions, answers,
descriptions of the result of an edit. Besides, a linear head, which is not published, names the shape and the colour
that each image token shows. It gives the vision tower more information on an image than a few words do.

Slots (B samples, T tokens of all of them, N image tokens, D width, V vocabulary):
    features (B, N, D)   tokens (T,) int64   lengths (B,) int64, tokens of each sample   logits (T, V)
    counts (T,) uint8, 1 where a token is predicted
    patches (B, N, 2) uint8, what each image token shows    next_token (B,), patch_naming (B,): the terms
"""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from parallel.program import Apply, Layer
from spar_scale.data.patches import NUM_LABELS, UNKNOWN
from spar_scale.data.prompts import build_tokenizer
from spar_scale.data.spec import SampleSpec
from spar_scale.models import internvl
from spar_scale.models.presets import Preset
from spar_scale.models.published import PretrainedPart
from spar_scale.objectives.next_token import next_token_loss
from spar_scale.stages import LatentScale, Stage
from spar_scale.stages.forward import Forward
from spar_scale.stages.parts import read_tokenizer

NUM_TOKENS = {"captions": 14, "questions": 40, "edits": 24, "texts": 48}
"""The longest prompt of each task, without the tokens of its picture."""


class NamePatches(Layer):
    """The term `patch_naming` (B,): the head's mean cross-entropy over a picture's tokens, shape and colour summed."""

    reads = ("features", "patches")
    writes = ("patch_naming",)

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(self, features: Tensor, patches: Tensor) -> dict[str, Tensor]:
        """Name what each token shows; a picture of which nothing is known costs nothing."""
        scores = self.head(features).float().split(NUM_LABELS, dim=-1)
        known = (patches[..., 0] != UNKNOWN).float()
        labels = patches.long() * (patches != UNKNOWN)
        each = [
            F.cross_entropy(score.transpose(1, 2), labels[..., kind], reduction="none")
            for kind, score in enumerate(scores)
        ]
        return {"patch_naming": (sum(each[1:], each[0]) * known).mean(1)}


def next_token_term() -> Layer:
    """Return the layer with the term `next_token`."""
    return Apply(next_token_loss, ("logits", "tokens", "counts", "lengths"), "next_token")


def published_forward(part: PretrainedPart, preset: Preset) -> Forward:
    """Return the forward of a language model with its vision tower, read from its published layout."""
    model = preset.language.load(part, preset.vision).eval()
    seeing, reading = internvl.training_layers(model, preset.vision, preset.language)
    text = read_tokenizer(part)
    sample = SampleSpec(task="language", image_size=preset.image_size, image_tokens=preset.image_tokens, text=text)
    return Forward(Stage(model, [*seeing, *reading], ("images", "tokens", "lengths"), {}, {}, sample), preset)


def save_mllm(stage: Stage, directory: Path, scale: LatentScale | None = None) -> None:
    """Write InternVL in transformers' published layout: config.json, safetensors, the tokenizer's files."""
    model = stage.model
    if hasattr(model, "naming_head"):
        del model.naming_head  # no part of the published layout
    internvl.save_mllm(model, directory)
    build_tokenizer().save_pretrained(str(directory))
