"""Which weights Muon takes: hidden matrices and full convolutions; AdamW keeps tables, embeddings, depthwise, heads."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from tiny_parts import make_parts
from tiny_runs import phase_values

from spar_scale.config.recipe import OptimizerConfig, Recipe
from spar_scale.stages import Stage, build
from spar_scale.training.optimizers import parameter_groups

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def names(*pieces: Any) -> set[str]:
    """Every way through the pieces, each one string or several, joined by dots."""
    listed = [[piece] if isinstance(piece, str) else [str(one) for one in piece] for piece in pieces]
    return {".".join(way) for way in product(*listed)}


SANA = "diffusion.transformer"
JOINT = {
    "main.muon": {
        *names("routing", ("gate.0", "gate.2", "projection"), "weight"),
        *names("connector.layers", range(2), "self_attn", ATTENTION, "weight"),
        *names("connector.layers", range(2), "mlp", MLP, "weight"),
        "connector.projection.weight",
    },
    "main.decay": {"queries.weight"},
    "diffusion.muon": {
        *names(SANA, "time_embed.emb.timestep_embedder", ("linear_1", "linear_2"), "weight"),
        *names(SANA, ("time_embed.linear", "caption_projection.linear_1", "caption_projection.linear_2"), "weight"),
        *names(
            SANA, "transformer_blocks", range(6), ("attn1", "attn2"), ("to_q", "to_k", "to_v", "to_out.0"), "weight"
        ),
        *names(SANA, "transformer_blocks", range(6), "ff", ("conv_inverted", "conv_point"), "weight"),
        f"{SANA}.proj_out.weight",
        *names("alignment_head", (0, 2, 4), "weight"),
    },
    "diffusion.decay": {
        f"{SANA}.patch_embed.proj.weight",
        f"{SANA}.scale_shift_table",
        *names(SANA, "transformer_blocks", range(6), ("scale_shift_table", "ff.conv_depth.weight")),
    },
}
LANGUAGE = "model.language_model"
MLLM_ADAMW = {
    f"{LANGUAGE}.embed_tokens.weight",
    "lm_head.weight",
    *names("model.vision_tower.embeddings", ("cls_token", "position_embeddings", "patch_embeddings.projection.weight")),
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, str]:
    return make_parts(tmp_path_factory.mktemp("parts"))


def stage_of(phase: str, parts: dict[str, str]) -> Stage:
    values = phase_values(Path("runs/x"), phase, Path("data"), parts)
    return build(Recipe.model_validate_json(json.dumps(values)))


def grouped(stage: Stage, optimizer: str) -> dict[str, set[str]]:
    """Group -> the names of its parameters."""
    own = {id(parameter): name for name, parameter in stage.model.named_parameters()}
    groups = parameter_groups(stage, OptimizerConfig.model_validate({"name": optimizer, "lr": 1e-3, "muon_lr": 0.02}))
    return {group["name"]: {own[id(parameter)] for parameter in group["params"]} for group in groups}


def test_the_joint_phase_name_by_name(parts):
    stage = stage_of("align/joint", parts)
    found = grouped(stage, "muon")
    for group, expected in JOINT.items():
        assert found[group] == expected, group
    vectors = {name for name, p in stage.model.named_parameters() if p.requires_grad and p.dim() == 1}
    assert found["main.plain"] | found["diffusion.plain"] == vectors
    assert found.keys() == {*JOINT, "main.plain", "diffusion.plain"}
    marked = {n for n, p in stage.model.named_parameters() if p.requires_grad and getattr(p, "use_muon", False)}
    assert marked == JOINT["main.muon"] | JOINT["diffusion.muon"]


def test_adamw_takes_them_all_and_decays_the_same(parts):
    found = grouped(stage_of("align/joint", parts), "adamw")
    assert found["main.decay"] == JOINT["main.muon"] | JOINT["main.decay"]
    assert found["diffusion.decay"] == JOINT["diffusion.muon"] | JOINT["diffusion.decay"]


def test_embeddings_and_the_language_head_are_left_to_adamw(parts):
    stage = stage_of("bootstrap/mllm", parts)
    found = grouped(stage, "muon")
    assert found["main.decay"] == {"lm_head.weight"} and found["main.plain"] > MLLM_ADAMW - found["main.decay"]
    matrices = {name for name, parameter in stage.model.named_parameters() if parameter.dim() > 1}
    assert found["main.muon"] == matrices - MLLM_ADAMW and len(found["main.muon"]) > 80


def test_full_convolutions_of_any_size_are_matrices(parts):
    stage = stage_of("bootstrap/autoencoder", parts)
    convolutions = {name for name, parameter in stage.model.named_parameters() if parameter.dim() == 4}
    sizes = {tuple(stage.model.get_parameter(name).shape[2:]) for name in convolutions}
    assert (3, 3) in sizes and convolutions <= grouped(stage, "muon")["main.muon"]
