"""A language-model family that is not Qwen2, reads no pictures and has no attention, for a test of the roles.

A token reads the mean of the tokens of its sample up to it: h + MLP(norm(h) + norm(mean)). Importing this module makes
the preset `toy` known, in this process: SPAR's connector around this language model, without vision encoder and
tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from nano import NANO
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from parallel.program import Apply, Layer
from parallel.tensor import COLUMN, ROW, ModulePlan, Plan, Split
from spar_scale.data.prompts import TOKENS, build_tokenizer
from spar_scale.models.initialise import initialise
from spar_scale.models.presets import PRESETS, Preset
from spar_scale.models.published import PretrainedPart, shapes_only
from spar_scale.models.roles import VisionEncoder
from spar_scale.ops.packing import position_ids, sample_of


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden: Tensor, mean: Tensor) -> Tensor:
        return hidden + self.narrow(torch.tanh(self.wide(self.norm(hidden) + self.norm(mean))))


class Trunk(nn.Module):
    def __init__(self, width: int, layers: int, words: int):
        super().__init__()
        self.words, self.norm = nn.Embedding(words, width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))


class Model(nn.Module):
    def __init__(self, width: int, layers: int, words: int):
        super().__init__()
        self.trunk, self.head = Trunk(width, layers, words), nn.Linear(width, words)


class Places(Layer):
    """The sample and the place of each token, with its queries behind each prompt: prompts first, then queries."""

    reads, writes = ("tokens", "lengths", "caption_order"), ("sample", "place", "caption_sample")
    derived = True

    def __init__(self, num_queries: int):
        super().__init__()
        self.num_queries = num_queries

    def forward(self, tokens: Tensor, lengths: Tensor, caption_order: Tensor) -> dict[str, Tensor]:
        of_queries = torch.arange(self.num_queries, device=lengths.device)
        queries = torch.arange(len(lengths), device=lengths.device).repeat_interleave(self.num_queries)
        behind = lengths[:, None] + of_queries
        sample = torch.cat([sample_of(lengths, len(tokens)), queries])
        place = torch.cat([position_ids(lengths, len(tokens)), behind.flatten()])
        return {"sample": sample, "place": place, "caption_sample": sample[caption_order]}


def mean_up_to(hidden: Tensor, sample: Tensor, place: Tensor, whole: bool = False) -> Tensor:
    """The mean of the tokens (T, D) of its sample up to each, or of the whole sample."""
    reads = (sample[:, None] == sample) & (whole | (place <= place[:, None]))
    return (reads.to(hidden.dtype) / reads.sum(1, keepdim=True)) @ hidden


class PromptBlock(Layer):
    def __init__(self, block: nn.Module, index: int, norm: nn.Module | None):
        super().__init__()
        self.block, self.norm, self.before = block, norm, f"prefix_state_{index - 1}"
        self.reads, self.writes = (self.before, "sample", "place"), (f"prefix_state_{index}",)
        self.detached = frozenset(self.writes)

    def forward(self, sample: Tensor, place: Tensor, **state: Tensor) -> dict[str, Tensor]:
        hidden = state[self.before]
        hidden = self.block(hidden, mean_up_to(hidden, sample[: len(hidden)], place[: len(hidden)]))
        return {self.writes[0]: hidden if self.norm is None else self.norm(hidden)}


class QueryBlock(Layer):
    def __init__(self, block: nn.Module, index: int, sampled: bool, norm: nn.Module | None):
        super().__init__()
        self.block, self.norm, self.before = block, norm, f"prefix_state_{index - 1}"
        self.reads = (self.before, "queries", "sample", "place")
        self.writes = ("queries", f"query_state_{index}") if sampled else ("queries",)

    def forward(self, queries: Tensor, sample: Tensor, place: Tensor, **state: Tensor) -> dict[str, Tensor]:
        whole = torch.cat([state[self.before], queries.flatten(0, 1)])
        mean = mean_up_to(whole, sample, place)[len(state[self.before]) :]
        queries = self.block(queries, mean.view_as(queries))
        after = queries if self.norm is None else self.norm(queries)
        return dict(zip(self.writes, (queries, after), strict=False))


class BothWays(Layer):
    reads, writes = ("captions", "caption_sample"), ("captions",)

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, captions: Tensor, caption_sample: Tensor) -> dict[str, Tensor]:
        return {"captions": self.block(captions, mean_up_to(captions, caption_sample, caption_sample, whole=True))}


@dataclass(frozen=True)
class ToyLanguage:
    """The face of the family (role `LanguageModel`)."""

    width: int
    layers: int
    vocab_size: int
    image_token_id: int = -1
    max_positions: int = 64
    initializer_range: float = 0.2
    plan: Plan = ()  # type: ignore[assignment]

    def __post_init__(self) -> None:
        plan: Plan = {
            Block: ModulePlan({"wide": COLUMN, "narrow": ROW}),
            Trunk: ModulePlan({"words": Split("vocabulary")}),
        }
        object.__setattr__(self, "plan", plan)

    @property
    def tensor_sizes(self) -> dict[str, int]:
        return {"width": self.width, "vocab_size": self.vocab_size}

    def build(self) -> Model:
        return Model(self.width, self.layers, self.vocab_size)

    def load(self, part: PretrainedPart, vision: VisionEncoder) -> nn.Module:
        model = self.build()
        if not shapes_only():
            part.check(part.config(), {"width": self.width, "layers": self.layers})
            model.load_state_dict(load_file(part.directory / "model.safetensors"), strict=True)
        return model

    def parts(self, mllm: nn.Module) -> tuple[nn.Module, nn.Module]:
        return mllm.get_submodule("trunk"), mllm.get_submodule("head")

    def save(
        self, trunk: nn.Module, head: nn.Module, encoder: nn.Module, source: PretrainedPart, directory: Path
    ) -> None:
        raise NotImplementedError("it reads no pictures")

    def position_layer(self, trunk: nn.Module, num_queries: int) -> Layer:
        return Places(num_queries)

    def prompt_layers(self, trunk: nn.Module, features: str | None, longest: int) -> list[Layer]:
        embed = Apply(trunk.get_submodule("words"), ("tokens",), "prefix_state_0", frozen=True)
        return [embed, *(PromptBlock(block, index, norm) for index, block, norm in self._numbered(trunk))]

    def query_layers(self, trunk: nn.Module, sampled: Iterable[int], longest: int) -> list[Layer]:
        return [QueryBlock(block, index, index in set(sampled), norm) for index, block, norm in self._numbered(trunk)]

    def decoding_layers(self, trunk: nn.Module, head: nn.Module) -> list[Layer]:
        return []

    def new_layers(self, trunk: nn.Module, number: int) -> tuple[list[nn.Module], nn.Module]:
        return [Block(self.width) for _ in range(number)], nn.LayerNorm(self.width)

    def last_layers(self, trunk: nn.Module, number: int) -> tuple[list[nn.Module], nn.Module]:
        return list(trunk.get_submodule("blocks").children())[-number:], trunk.get_submodule("norm")

    def bidirectional_layer(self, layer: nn.Module, longest: int) -> Layer:
        return BothWays(layer)

    def _numbered(self, trunk: nn.Module) -> list[tuple[int, nn.Module, nn.Module | None]]:
        blocks = list(trunk.get_submodule("blocks").children())
        norms = [None] * (len(blocks) - 1) + [trunk.get_submodule("norm")]
        return list(zip(range(1, len(blocks) + 1), blocks, norms, strict=True))


TOY = Preset(
    name="toy",
    image_size=NANO.image_size,
    language=ToyLanguage(width=16, layers=4, vocab_size=len(TOKENS) + len(TOKENS) % 2),
    autoencoder=NANO.autoencoder,
    conditioning=NANO.conditioning,
    diffusion=NANO.diffusion,
    sampling=NANO.sampling,
)
PRESETS["toy"] = TOY


def write_language_model(folder: Path) -> Path:
    """Write a language model of the family with seeded weights in its own layout."""
    language = TOY.language
    assert isinstance(language, ToyLanguage)
    model = language.build()
    initialise(model, seed=4)
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    build_tokenizer().save_pretrained(str(folder))
    (folder / "config.json").write_text(json.dumps({"width": language.width, "layers": language.layers}))
    return folder
