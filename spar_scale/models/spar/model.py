"""SPAR in one piece: language model, routing, connector, diffusion transformer, around an image tokenizer.

Parts only; the list of layers (`layers.py`) is the forward, in training and in use.

Legend: B batch, T prompt tokens of all samples, Q queries, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spar_scale.models.blocks import Composition
from spar_scale.models.roles import DiffusionModel, LanguageModel
from spar_scale.models.spar.connector import Connector
from spar_scale.models.spar.routing import Kind, TokenRouting
from spar_scale.models.spar.shapes import ConditioningShape


class QueryEmbeddings(nn.Module):
    """The learnable queries, one for each position of the target grid, drawn from N(0, 1)."""

    def __init__(self, num_queries: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, num_queries, width))

    def forward(self, batch: int) -> Tensor:
        """Return the queries for `batch` samples (B, Q, D)."""
        return self.weight.expand(batch, -1, -1)

    def _init_weights(self, module: nn.Module) -> None:
        nn.init.normal_(self.weight)


class SPAR(Composition):
    """The unified model; parameter names are the checkpoint's.

    The language model and its head are taken from `mllm`, whose vision tower is left behind: the
    tokenizer's serves instead, for the picture to edit and for questions. `alignment_head` exists
    where the diffusion transformer is aligned, `teacher` where that follows a vision encoder of its own.
    What is not taken from `mllm`, `tokenizer` or `diffusion` is uninitialised.
    """

    alignment_head: nn.Module
    teacher: nn.Module

    def __init__(
        self,
        shape: ConditioningShape,
        language: LanguageModel,
        diffusion: DiffusionModel,
        mllm: nn.Module,
        tokenizer: nn.Module,
        transformer: nn.Module,
        routing: Kind = "dynamic",
        aligned: bool = False,
    ):
        super().__init__()
        self.tokenizer = tokenizer
        self.language_model, self.lm_head = language.parts(mllm)
        self.queries = QueryEmbeddings(shape.num_queries, language.width)
        self.routing = TokenRouting(language.width, language.layers, shape.sampled_states, routing, shape.temperature)
        self.connector = Connector(language, self.language_model, shape.connector_layers, diffusion.caption_channels)
        self.diffusion = transformer
        if aligned:
            self.alignment_head = diffusion.alignment_head(language.width)


def keep_references(routed: Tensor, embedded: Tensor, is_image: Tensor) -> Tensor:
    """Put the embeddings (T, D) back over the routed tokens (T + B Q, D) where `is_image` (T,) is true.

    The reference picture conditions twice: through the language model, and as its features are.
    """
    prompt, queries = routed[: len(embedded)], routed[len(embedded) :]
    return torch.cat([torch.where(is_image[:, None], embedded, prompt), queries])
