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

`thin_1b` and `thin_3b` are these in a rehearsal on a laptop: every published width, the vocabulary, 448 pixels and 256
queries, with few layers and a small autoencoder. `rehearsal_nano` has the published vocabulary, patch, pixel shuffle
and compression, so that it resizes where they do, at the least widths and 224 pixels.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, cast

from parallel.errors import UserError
from spar_scale.models.dc_ae import Autoencoder as DCAE
from spar_scale.models.dual_stream import DualStream
from spar_scale.models.internvl import Language, Vision
from spar_scale.models.roles import Autoencoder, DiffusionModel, ImageTokenizer, LanguageModel, Member, VisionEncoder
from spar_scale.models.sana import Sana
from spar_scale.models.spar import Conditioning, SamplingShape


class Absent:
    """Stands in a preset for a role that it has no member for; using it raises UserError, which names both."""

    def __init__(self, preset: str, role: str):
        self._preset, self._role = preset, role

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise UserError(f"model.preset: '{self._preset}' has no {self._role}, which this phase or command needs")


_ABSENT: Any = None  # a role without a member; an `Absent` takes its place


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A member for each role that a system has; roles may be absent.

    Raises ValueError, naming the field, for shapes that cannot work together: a wrong number is named where it stands
    and not by a shape mismatch in the middle of a forward.
    """

    name: str
    image_size: int  # pixels
    language: LanguageModel = _ABSENT
    vision: VisionEncoder = _ABSENT
    autoencoder: Autoencoder = _ABSENT
    tokenizer: ImageTokenizer = _ABSENT
    conditioning: Conditioning = _ABSENT
    diffusion: DiffusionModel = _ABSENT
    sampling: SamplingShape = _ABSENT

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of a latent."""
        return self.autoencoder.latent_channels, self.grid, self.grid

    @property
    def grid(self) -> int:
        """Latent positions on a side: the vision encoder's tokens, or, without one, those of the diffusion model."""
        return self.diffusion.sample_size if isinstance(self.vision, Absent) else self.vision.grid

    @property
    def latent_positions(self) -> int:
        """Positions of a latent."""
        return self.grid**2

    @property
    def image_tokens(self) -> int:
        """Tokens of a picture in a prompt; 0 without a vision encoder."""
        return 0 if isinstance(self.vision, Absent) else self.vision.tokens

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt, its picture between `<img>` and `</img>`, and the queries."""
        return self.conditioning.max_words + self.image_tokens + 2 + self.conditioning.num_queries

    @property
    def smallest_size(self) -> int:
        """Pixels on a side of the smallest picture that is whole in tokens and in latent positions."""
        return math.lcm(round(self.vision.pixels_per_token), self.autoencoder.compression)

    def at(self, image_size: int) -> Preset:
        """Return the preset for pictures of another size: the same weights, with interpolated positions.

        The roles whose shapes are bound to the preset's own size (conditioning, diffusion) are then absent. Raises
        UserError for a size that is not whole in tokens and latent positions.
        """
        if image_size == self.image_size:
            return self
        whole = self.smallest_size
        if image_size % whole:
            near = max(1, round(image_size / whole)) * whole
            raise UserError(
                f"model.image_size: found {image_size}, must be a multiple of {whole}: tokens of preset '{self.name}'"
                f" have {self.vision.pixels_per_token:g} pixels on a side, its latent positions"
                f" {self.autoencoder.compression}; nearest: {near}"
            )
        bound = {role: Absent(self.name, role) for role in ("conditioning", "diffusion", "sampling")}
        return replace(self, image_size=image_size, vision=self.vision.at(image_size), **cast(Any, bound))

    @property
    def members(self) -> dict[str, Member]:
        """Role -> its member, for the roles that are there and hold modules."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {role: member for role, member in found.items() if hasattr(type(member), "plan")}

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) is None or isinstance(getattr(self, field.name), Absent):
                object.__setattr__(self, field.name, Absent(self.name, field.name))
        for number, relation, whole in _RULES:
            try:
                found, expected = operator.attrgetter(number, whole)(self)
            except (UserError, AttributeError):  # of a role that is absent, or a size that its family does not have
                continue
            if not _HOLDS[relation](found, expected):
                raise ValueError(f"preset '{self.name}': {number} = {found} must {relation} {whole} = {expected}")


_HOLDS: dict[str, Callable[[float, float], bool]] = {
    "equal": operator.eq,
    "divide": lambda number, whole: number > 0 and whole % number == 0,
    "be at most": operator.le,
    "be below": operator.lt,
}
_RULES = (
    ("vision.picture_size", "equal", "image_size"),
    ("vision.pixels_per_token", "divide", "vision.picture_size"),
    ("vision.heads", "divide", "vision.width"),
    ("vision.output_width", "equal", "language.width"),
    ("tokenizer.pixel_heads", "divide", "vision.output_width"),
    ("language.heads", "divide", "language.width"),
    ("language.key_value_heads", "divide", "language.heads"),
    ("language.image_token_id", "be below", "language.vocab_size"),
    ("conditioning.num_queries", "equal", "latent_positions"),
    ("conditioning.sampled_states", "be at most", "language.layers"),
    ("conditioning.connector_layers", "be at most", "language.layers"),
    ("longest_sequence", "be at most", "language.max_positions"),
    ("diffusion.latent_channels", "equal", "autoencoder.latent_channels"),
    ("diffusion.sample_size", "equal", "vision.grid"),
    ("diffusion.patch_size", "divide", "diffusion.sample_size"),
    ("diffusion.cross_width", "equal", "diffusion.width"),
)


def resized(preset: Preset, *, name: str, image_size: int | None = None, **roles: dict[str, Any]) -> Preset:
    """Return a preset like another one, with some sizes of its members changed: role={size: value, ...}."""
    members = {role: replace(cast(Any, getattr(preset, role)), **sizes) for role, sizes in roles.items()}
    return replace(preset, name=name, image_size=image_size or preset.image_size, **cast(Any, members))


TINY = Preset(
    name="tiny",
    image_size=32,
    vision=Vision(
        image_size=32,
        patch_size=8,
        width=128,
        layers=4,
        heads=4,
        mlp_width=512,
        downsample_ratio=1.0,
        output_width=128,
    ),
    autoencoder=DCAE(
        latent_channels=32,
        channels=(12, 24, 96, 96),
        encoder_layers=(0, 1, 1, 2),
        decoder_layers=(0, 1, 1, 2),
        encoder_blocks=("ResBlock",) * 4,
        decoder_blocks=("ResBlock",) * 4,
        multiscales=((),) * 4,
    ),
    tokenizer=DualStream(residual_blocks=3, pixel_layers=6, pixel_heads=4, fusion_residual=True),
    language=Language(
        width=128,
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
    conditioning=Conditioning(
        num_queries=16, sampled_states=4, connector_layers=2, max_words=14, connector_copies=False
    ),
    diffusion=Sana(
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

TINY_48 = resized(
    TINY,
    name="tiny_48",
    image_size=48,
    vision={"image_size": 48},
    conditioning={"num_queries": 36},
    diffusion={"sample_size": 6},
)

SPAR_1B = Preset(
    name="spar_1b",
    image_size=448,
    vision=Vision(
        image_size=448,
        patch_size=14,
        width=1024,
        layers=24,
        heads=16,
        mlp_width=4096,
        downsample_ratio=0.5,
        output_width=896,
    ),
    autoencoder=DCAE(
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
    tokenizer=DualStream(residual_blocks=3, pixel_layers=6, pixel_heads=16),
    language=Language(
        width=896,
        layers=24,
        heads=14,
        key_value_heads=2,
        mlp_width=4864,
        vocab_size=151674,
        image_token_id=151667,
        max_positions=32768,
        rope_factor=2.0,
    ),
    conditioning=Conditioning(num_queries=256, sampled_states=4, connector_layers=6, max_words=768),
    diffusion=Sana(
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

SPAR_3B = resized(
    SPAR_1B,
    name="spar_3b",
    vision={"output_width": 1536},
    language={"width": 1536, "layers": 28, "heads": 12, "mlp_width": 8960},
    diffusion={"layers": 20, "heads": 70, "cross_heads": 20, "cross_head_width": 112},
)

_THIN: dict[str, dict[str, Any]] = {
    "vision": {"layers": 2},
    "autoencoder": {
        "channels": (32, 64, 64, 128, 128, 128),
        "encoder_layers": (1,) * 6,
        "decoder_layers": (1,) * 6,
    },
    "tokenizer": {"residual_blocks": 1, "pixel_layers": 1},
    "language": {"layers": 4},
    "conditioning": {"connector_layers": 1},
}
THIN_1B = resized(SPAR_1B, name="thin_1b", image_size=None, **_THIN, diffusion={"layers": 6})
THIN_3B = resized(SPAR_3B, name="thin_3b", image_size=None, **_THIN, diffusion={"layers": 2})

REHEARSAL_NANO = resized(
    SPAR_1B,
    name="rehearsal_nano",
    image_size=224,
    vision={"image_size": 224, "width": 32, "layers": 2, "heads": 2, "mlp_width": 64, "output_width": 32},
    autoencoder={
        "channels": (8, 8, 16, 32, 32, 32),
        "encoder_layers": (1,) * 6,
        "decoder_layers": (1,) * 6,
        "attention_head_dim": 16,
    },
    tokenizer={"residual_blocks": 1, "pixel_layers": 2, "pixel_heads": 2},
    language={"width": 32, "layers": 4, "heads": 4, "mlp_width": 64, "max_positions": 1024},
    conditioning={"num_queries": 64, "connector_layers": 1},
    diffusion={
        "sample_size": 8,
        "layers": 2,
        "heads": 2,
        "head_width": 16,
        "cross_heads": 2,
        "cross_head_width": 16,
        "caption_channels": 32,
        "align_hidden": 32,
    },
)

PRESETS = {preset.name: preset for preset in (TINY, TINY_48, SPAR_1B, SPAR_3B, THIN_1B, THIN_3B, REHEARSAL_NANO)}
_DC_AE = "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"
REPOSITORIES: dict[str, dict[str, str]] = {
    "spar_1b": {
        "mllm": "OpenGVLab/InternVL3-1B-hf",
        "pixel_autoencoder": _DC_AE,
        "diffusion": "the folder transformer of Efficient-Large-Model/Sana_600M_512px_diffusers",
    },
    "spar_3b": {
        "mllm": "OpenGVLab/InternVL3-2B-hf",
        "pixel_autoencoder": _DC_AE,
        "diffusion": "the folder transformer of Efficient-Large-Model/Sana_1600M_512px_diffusers",
    },
}
"""Preset -> pretrained part -> where it is published."""
REHEARSED: dict[str, dict[str, str]] = {
    "thin": {"spar_1b": "thin_1b", "spar_3b": "thin_3b"},
    "nano": {"spar_1b": "rehearsal_nano", "spar_3b": "rehearsal_nano"},
}
"""Form of a rehearsal -> published preset -> the preset that takes its place."""
