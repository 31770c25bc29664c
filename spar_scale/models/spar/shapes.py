"""The shape of what SPAR adds between a language model and a diffusion transformer, and of sampling."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ConditioningShape:
    """Between the language model and the diffusion transformer: queries, routing, connector."""

    num_queries: int  # one for each position of the latent grid
    sampled_states: int  # K, the hidden states that a token chooses among
    connector_layers: int
    max_words: int  # tokens of a prompt without its picture; longer samples are bad ones
    temperature: float = 1.0  # tau of the routing weights
    connector_copies: bool = True  # start from the language model's last layers, as published; else from the seed


@dataclass(frozen=True)
class SamplingShape:
    """How pictures are drawn unless a user says otherwise."""

    steps: int
    guidance: float
    flow_shift: float  # of the sampler's time steps; training has its own, objective.timestep_shift
