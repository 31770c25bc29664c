"""The bidirectional connector between the language model and the diffusion transformer.

Legend: D width of the language model, C caption channels.
Decoder layers of the language model's own class, as published started from its last layers and final norm,
but without the causal order: every token attends to all tokens of its sample. Position ids are those of the language
model. The conditional projection then leads to the caption channels of the diffusion transformer. Published code pads
and masks; packed samples need neither. The list of layers (`layers.py`) is the forward.
"""

from __future__ import annotations

from torch import nn

from spar_scale.models.published import copy_weights
from spar_scale.models.roles import LanguageModel


class Connector(nn.Module):
    """`num_layers` bidirectional decoder layers, final norm, projection to `caption_channels`.

    `trunk` is the language model that the layers are made like. Weights are uninitialised; `copy_last_layers` is the
    published start. Raises ValueError for more layers than the language model has.
    """

    def __init__(self, language: LanguageModel, trunk: nn.Module, num_layers: int, caption_channels: int):
        super().__init__()
        if not 1 <= num_layers <= language.layers:
            raise ValueError(f"a connector of {num_layers} layers from a model of {language.layers}")
        self.initializer_range = language.initializer_range
        layers, norm = language.new_layers(trunk, num_layers)
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.projection = nn.Linear(language.width, caption_channels)

    def copy_last_layers(self, language: LanguageModel, trunk: nn.Module) -> None:
        """Start from the last layers and the final norm of the language model."""
        layers, norm = language.last_layers(trunk, len(self.layers))
        for mine, its in zip(self.layers, layers, strict=True):
            copy_weights(mine, its)
        copy_weights(self.norm, norm)

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.projection:
            self.projection.reset_parameters()
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        else:  # a norm
            for name, parameter in module.named_parameters(recurse=False):
                parameter.fill_(1.0 if name == "weight" else 0.0)
