"""Uses of a forward without its loss: each runs those layers of the list that its outputs depend on.

Legend: B samples, N captions of all samples one after another (tokens and queries), D and C widths,
latents (B, Z, g, g), V vocabulary. Prompts are lists of tokens.
Everything runs without gradient, in the mode that the model is in.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.errors import UserError
from parallel.program import Subprogram
from spar_scale.data.text import TextTokenizer
from spar_scale.models.presets import Preset
from spar_scale.stages import Stage

REFERENCES = "reference_features"
Prompts = Sequence[Sequence[int]]


class Forward:
    """The forward of a stage of a preset, from any of its slots to any other.

    Raises UserError for an output whose slots the stage does not have.
    """

    def __init__(self, stage: Stage, preset: Preset):
        self.stage, self.preset = stage, preset
        self._layers = [*stage.layers, *stage.uses]
        self._program = functools.cache(functools.partial(_program, tuple(self._layers)))
        self._has_references = any(REFERENCES in layer.reads for layer in self._layers)

    @torch.no_grad()
    def run(self, *wanted: str, **given: Tensor) -> dict[str, Tensor]:
        """Return the wanted slots; layers that compute a given slot are left out."""
        slots = {name: tensor.to(self.device) for name, tensor in given.items()}
        return self._program(wanted, tuple(sorted(given)))(slots)

    @property
    def device(self) -> torch.device:
        """The device of the model. `run` moves what it is given there."""
        return next((parameter.device for parameter in self.stage.model.parameters()), torch.device("cpu"))

    def reads(self, slot: str) -> bool:
        """Whether a layer of the stage reads or writes a slot."""
        return any(slot in (*layer.reads, *layer.writes) for layer in self._layers)

    @property
    def text(self) -> TextTokenizer:
        """The tokenizer of its words."""
        return self.stage.sample.tokenizer

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] to features (B, tokens, D) of the vision encoder."""
        return self.run("features", images=images)["features"]

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] to the tokenizer's latents (B, Z, g, g), not scaled."""
        if self.reads("target_features"):
            return self.run("tokenizer_latent", target_features=self.features(images))["tokenizer_latent"]
        slot = "target_image" if self.reads("target_image") else "images"
        return self.run("tokenizer_latent", **{slot: images})["tokenizer_latent"]

    def decode(self, latents: Tensor) -> Tensor:
        """Return images (B, 3, S, S) of latents that are not scaled: fp32, about [0, 1], not clamped."""
        return self.run("reconstruction", decoder_input=latents)["reconstruction"]

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] through the latent and back, fp32, clamped to [0, 1]."""
        return self.decode(self.encode(images)).clamp(0, 1)

    def draw(self, latents: Tensor) -> Tensor:
        """Return images (B, 3, S, S), clamped to [0, 1], of scaled latents (B, Z, g, g)."""
        assert self.stage.latent_scale is not None
        return self.decode(latents / self.stage.latent_scale).clamp(0, 1)

    def condition(self, prompts: Prompts, references: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return captions (N, C) of prompts, and the bounds of each prompt's (B + 1,), for `velocity`.

        references (B, 3, S, S) in [0, 1] are pictures to edit.
        """
        slots = self.run("captions", "caption_bounds", **self._prompt(prompts, references))
        return slots["captions"], slots["caption_bounds"]

    def velocity(self, latents: Tensor, timestep: Tensor, captions: Tensor, bounds: Tensor) -> Tensor:
        """Predict the velocity (B, Z, g, g) of scaled noisy latents at timestep (B,) = 1000 sigma."""
        return self.run("velocity", noisy_latent=latents, timestep=timestep, captions=captions, caption_bounds=bounds)[
            "velocity"
        ]

    @property
    def sampled_layers(self) -> tuple[int, ...]:
        """The language model's layers whose hidden states are routed."""
        states = {slot for layer in self._layers for slot in layer.writes if slot.startswith("query_state_")}
        return tuple(sorted(int(slot.rpartition("_")[2]) for slot in states))

    def routing_weights(self, prompts: Prompts, references: Tensor | None = None) -> Tensor:
        """Return the routing weights (N, K) of the captions of prompts; arguments as for `condition`."""
        return self.run("routing_weights", **self._prompt(prompts, references))["routing_weights"]

    def next_token(self, prompts: Prompts, features: Tensor | None = None) -> Tensor:
        """Return the logits (B, V) of the token that follows each prompt.

        `features` (B, tokens, D) are of the picture that the prompt shows.
        """
        state, given = f"prefix_state_{self.preset.language.layers}", self._seen(prompts, features)
        last = given["lengths"].cumsum(0) - 1
        return self.run("logits", **{state: self.run(state, **given)[state][last]})["logits"]

    @torch.no_grad()
    def continue_prompt(self, tokens: Sequence[int], features: Tensor, stop: frozenset[int], limit: int) -> list[int]:
        """Continue one prompt, the likeliest token each time; return the new tokens.

        Ends before a token of `stop`, or after `limit` tokens. Keys and values are kept, so that each further token
        runs alone.
        """
        layers = range(1, self.preset.language.layers + 1)
        kept = [f"prefix_{kind}_{index}" for index in layers for kind in ("keys", "values")]
        slots = self.run("logits", *kept, **self._seen([tokens], features))
        step = Subprogram(self.stage.decoding, ("logits", *kept))
        new: list[int] = []
        while len(new) < limit:
            best = slots["logits"][-1:].argmax(-1)
            if int(best) in stop:
                break
            new.append(int(best))
            position = torch.tensor([len(tokens) + len(new) - 1], device=self.device)
            slots = step({**slots, "token": best, "position": position})
        return new

    def _prompt(self, prompts: Prompts, references: Tensor | None) -> dict[str, Tensor]:
        """The slots of prompts and of the pictures that they edit."""
        features = None if references is None else self.features(references)
        return self._seen(prompts, features, queries=self.preset.conditioning.num_queries)

    def _seen(self, prompts: Prompts, features: Tensor | None, queries: int = 0) -> dict[str, Tensor]:
        """The slots of prompts and of the features that they show; none stands for zeros, which no token takes."""
        longest, limit = max(map(len, prompts)), self.preset.longest_sequence - queries
        if longest > limit:  # the bound of the attention kernels
            raise UserError(f"a prompt has {longest} tokens; preset '{self.preset.name}' takes up to {limit}")
        slot = REFERENCES if self._has_references else "features"
        if features is None:
            features = torch.zeros(len(prompts), 1, self.preset.language.width)
        slots = {
            "tokens": torch.tensor([token for prompt in prompts for token in prompt]),
            "lengths": torch.tensor([len(prompt) for prompt in prompts]),
            slot: features,
        }
        return {name: value.to(self.device) for name, value in slots.items()}


def _program(layers: Sequence, wanted: tuple[str, ...], given: tuple[str, ...]) -> Subprogram:
    return Subprogram(layers, wanted, given)
