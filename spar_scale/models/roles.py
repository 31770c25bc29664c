"""The roles that models play in a preset, as protocols. A family of models implements one in its `__init__.py`.

A member of a role is a frozen dataclass of shapes with the methods below. Code outside a family knows members and
slots, not classes of modules. A new family is a folder with the same files: `shapes.py`, `model.py` (mathematics on one
device), `layers.py` (the forward as layers over slots), `sharding.py` (cuts over tensor-parallel ranks), `weights.py`
(published layouts), and `__init__.py`, which is its face. Slots are described in the families' `layers.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import nn

    from parallel.program import Layer
    from parallel.tensor import Plan
    from spar_scale.models.published import PretrainedPart


class Member(Protocol):
    """What every member of a role tells."""

    @property
    def plan(self) -> Plan:
        """How its modules are cut over tensor-parallel ranks."""
        ...

    @property
    def tensor_sizes(self) -> dict[str, int]:
        """Name of a size -> the size, for all that a tensor-parallel size must divide."""
        ...


class VisionEncoder(Member, Protocol):
    """Pictures (B, 3, S, S) in [0, 1] to features (B, tokens, output_width)."""

    @property
    def image_size(self) -> int:
        """Pixels on a side of its pictures."""
        ...

    @property
    def pixels_per_token(self) -> float:
        """Pixels on a side of a token."""
        ...

    def at(self, image_size: int) -> VisionEncoder:
        """Return the encoder for pictures of another size, with the same weights."""
        ...

    @property
    def grid(self) -> int:
        """Tokens on a side of a picture."""
        ...

    @property
    def tokens(self) -> int:
        """Tokens of a picture."""
        ...

    @property
    def output_width(self) -> int:
        """Width of the features."""
        ...

    def build(self) -> nn.Module:
        """Return a module with parts `vision_tower` and `projector`, weights uninitialised."""
        ...

    def load(self, part: PretrainedPart) -> nn.Module:
        """Return the same with pretrained weights in the part's precision."""
        ...

    def feature_layers(
        self, encoder: nn.Module, frozen: bool, reads: str = "images", writes: str = "features"
    ) -> list[Layer]:
        """Return the way from images to features, of a module with the two parts."""
        ...


class LanguageModel(Member, Protocol):
    """A causal language model: prompts to hidden states, also of queries behind them, and to words."""

    @property
    def width(self) -> int:
        """Width of its hidden states."""
        ...

    @property
    def layers(self) -> int:
        """Number of its layers."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of its tokens."""
        ...

    @property
    def image_token_id(self) -> int:
        """The token that a feature of a picture replaces; -1 for a model that reads no pictures."""
        ...

    @property
    def max_positions(self) -> int:
        """Length of the longest sequence."""
        ...

    @property
    def initializer_range(self) -> float:
        """Deviation of initial weights of linears like its own."""
        ...

    def load(self, part: PretrainedPart, vision: VisionEncoder) -> nn.Module:
        """Return the model with pretrained weights in the part's precision.

        `vision` is the preset's vision encoder, if it has one.
        """
        ...

    def parts(self, mllm: nn.Module) -> tuple[nn.Module, nn.Module]:
        """Return the trunk (the model without its head) and the head of what `load` gave."""
        ...

    def save(
        self, trunk: nn.Module, head: nn.Module, encoder: nn.Module, source: PretrainedPart, directory: Path
    ) -> None:
        """Write the model with a vision encoder in its published layout.

        The files beside the weights, such as those of the text tokenizer, are those of `source`, where it was read.
        """
        ...

    def position_layer(self, trunk: nn.Module, num_queries: int) -> Layer:
        """Return the derived layer from `tokens`, `lengths` and `caption_order` to what its other layers read."""
        ...

    def prompt_layers(self, trunk: nn.Module, features: str | None, longest: int) -> list[Layer]:
        """Return the way from `tokens`, and a slot of features, to every `prefix_state_k`, without gradient.

        The first layer embeds; one for each layer of the model follows. No sample with its queries has more than
        `longest` tokens.
        """
        ...

    def query_layers(self, trunk: nn.Module, sampled: Iterable[int], longest: int) -> list[Layer]:
        """Return one layer for each layer of the model: `queries` one further, on `prefix_state_k`.

        The hidden states in `sampled` are written as `query_state_k`.
        """
        ...

    def decoding_layers(self, trunk: nn.Module, head: nn.Module) -> list[Layer]:
        """Return the way of one further `token` at `position` to its `logits`, past kept keys and values."""
        ...

    def new_layers(self, trunk: nn.Module, number: int) -> tuple[list[nn.Module], nn.Module]:
        """Return further layers and a final norm like those of the model, uninitialised."""
        ...

    def last_layers(self, trunk: nn.Module, number: int) -> tuple[list[nn.Module], nn.Module]:
        """Return the last layers of the model and its final norm."""
        ...

    def bidirectional_layer(self, layer: nn.Module, longest: int) -> Layer:
        """Return a layer of the model on `captions`, in which every token attends to all of its sample."""
        ...


class Autoencoder(Member, Protocol):
    """A pixel autoencoder with parts `encoder` and `decoder`."""

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        ...

    @property
    def compression(self) -> int:
        """Pixels on a side of a latent position."""
        ...

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels by resolution, the finest first."""
        ...

    def build(self) -> nn.Module:
        """Return the model, weights uninitialised."""
        ...

    def begin(self, autoencoder: nn.Module) -> None:
        """Change initial weights for a training from the seed."""
        ...

    def load(self, part: PretrainedPart) -> tuple[nn.Module, float]:
        """Return the model with pretrained weights in the part's precision, and the scale of its latents."""
        ...

    def save(self, autoencoder: nn.Module, directory: Path, scale: float | None = None) -> None:
        """Write the published layout, with the scale of its latents where given."""
        ...

    def encoding_layer(
        self,
        encoder: nn.Module,
        frozen: bool,
        side: int | None = None,
        reads: str = "images",
        writes: str = "tokenizer_latent",
    ) -> Layer:
        """Return the way from images, resized to `side` pixels where given, to latents."""
        ...

    def reconstruction_layers(self, decoder: nn.Module, image_size: int) -> list[Layer]:
        """Return the way from `decoder_input` to `reconstruction` of `image_size` pixels."""
        ...


class ImageTokenizer(Member, Protocol):
    """A tokenizer that reads features of a vision encoder and is drawn by the decoder of a pixel autoencoder."""

    def load(self, part: PretrainedPart, vision: VisionEncoder, autoencoder: Autoencoder) -> tuple[nn.Module, float]:
        """Return the model with pretrained weights in the part's precision, and the scale of its latents.

        It has parts `vision_tower`, `projector` and `decoder`.
        """
        ...

    def save(self, tokenizer: nn.Module, directory: Path, preset: str, latent_scale: float, images: int) -> None:
        """Write the model without teachers; the scale of its latents was measured on a number of images."""
        ...

    def latent_layers(self, tokenizer: nn.Module, features: str = "features") -> list[Layer]:
        """Return the way from a slot of features to `tokenizer_latent`."""
        ...


class DiffusionModel(Member, Protocol):
    """A diffusion transformer that predicts a velocity from a noisy latent and captions."""

    @property
    def layers(self) -> int:
        """Number of its blocks."""
        ...

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        ...

    @property
    def sample_size(self) -> int:
        """Latent positions on a side."""
        ...

    @property
    def caption_channels(self) -> int:
        """Width of a caption's tokens."""
        ...

    def build(self) -> nn.Module:
        """Return the model, weights uninitialised."""
        ...

    def load(self, part: PretrainedPart) -> nn.Module:
        """Return the model with pretrained weights in the part's precision."""
        ...

    def save(self, diffusion: nn.Module, directory: Path) -> None:
        """Write the published layout."""
        ...

    def velocity_layers(self, diffusion: nn.Module, longest: int, tap: tuple[int, Layer] | None = None) -> list[Layer]:
        """Return the way from `noisy_latent`, `timestep`, `captions` and `caption_bounds` to `velocity`.

        No sample has more than `longest` captions. A tap (number from 1, layer) stands behind that block, where it
        reads `image_tokens`.
        """
        ...

    def alignment_head(self, teacher_width: int) -> nn.Module:
        """Return the head from `image_tokens` to features of a teacher, weights uninitialised."""
        ...
