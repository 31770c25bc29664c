"""The tokenizer's phases and the switches of its ablations: what runs, what trains, what stays as it was."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.program import Program, pack, run_layer, unpack
from spar_scale.config.recipe import OptimizerConfig, Recipe
from spar_scale.models.initialise import initialise
from spar_scale.models.internvl.vision import normalise
from spar_scale.models.presets import PRESETS
from spar_scale.objectives.reconstruction import gradient_difference, mean_squared_error
from spar_scale.stages import build
from spar_scale.stages.forward import Forward
from spar_scale.training.optimizers import parameter_groups

TINY: Any = PRESETS["tiny"]
PHASES = ("init", "decoder", "encoder")
STREAMS = ("dual", "semantic", "pixel")
PARTS = {
    "dual": {"semantic_stream", "pixel_stream", "fusion"},
    "semantic": {"semantic_stream"},
    "pixel": {"pixel_stream"},
}


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    model = TINY.autoencoder.build()
    initialise(model, seed=7)
    TINY.autoencoder.save(model, directory := tmp_path_factory.mktemp("autoencoder"))
    return directory


@pytest.fixture
def stage_of(autoencoder):
    """Build a phase from a real recipe; keys are switches of `model` or weights of `objective`."""

    def stage(phase, **changes):
        objective = {key: changes.pop(key) for key in list(changes) if key.endswith("_weight")}
        return build(
            Recipe.model_validate(
                {
                    "stage": "tokenizer", "phase": phase, "run_dir": "runs/x", "global_batch": 2, "train": {"steps": 2},
                    "model": {"preset": "tiny", "pretrained": {"pixel_autoencoder": str(autoencoder)}, **changes},
                    "objective": {"perceptual_weight": 0.1, **objective}, "optimizer": {"lr": 1e-3},
                    "data": {"task_block": 2, "sources": [{"name": "images", "shards": "x.tar"}]},
                    "checkpoint": {"every": 2},
                }
            )
        )  # fmt: skip

    return stage


def features_of(model: Any, images: Tensor) -> Tensor:
    """By transformers' own forward of the vision tower; a patch is a token, so nothing is folded."""
    return model.projector(model.vision_tower(normalise(images)).last_hidden_state[:, 1:])


def latent_of(model: Any, streams: str, images: Tensor) -> Tensor:
    """By the published formulas: z_f of the streams that exist."""
    features = features_of(model, images)
    if streams != "pixel":
        tokens = semantic = model.semantic_stream(features)
    if streams != "semantic":
        hidden = features
        for layer in model.pixel_stream.layers:
            hidden = layer(hidden)
        tokens = pixel = model.pixel_stream.head(model.pixel_stream.blocks(hidden))
    if streams == "dual":
        tokens = model.fusion(semantic, pixel)
    return tokens.transpose(1, 2).contiguous().view(len(images), 32, 4, 4)


def program_of(stage):
    return Program(stage.layers, stage.inputs, list(stage.terms))


def images_of(seed=0):
    return {"images": torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))}


def disturb(*modules):
    """Move every weight a little, so that nothing is zero or equal that only starts so."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def train(stage, steps=2):
    program = program_of(stage)
    optimizer = torch.optim.AdamW([p for p in stage.model.parameters() if p.requires_grad], lr=1e-3)
    weights = torch.tensor(list(stage.terms.values()))
    for step in range(steps):
        optimizer.zero_grad()
        (program(images_of(step)) @ weights).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("phase", PHASES)
def test_the_layers_equal_the_libraries_towers_and_decoder_around_the_streams(stage_of, phase, streams):
    stage, batch = stage_of(phase, streams=streams), images_of()
    model = stage.model
    disturb(model)
    terms = dict(zip(stage.terms, program_of(stage)(batch).unbind(1), strict=True))
    reconstruction = (model.decoder(latent_of(model, streams, batch["images"])) + 1) / 2
    assert torch.equal(terms["mean_squared_error"], mean_squared_error(reconstruction, batch["images"]))
    assert torch.equal(terms["gradient_difference"], gradient_difference(reconstruction, batch["images"]))


@pytest.mark.parametrize("streams", STREAMS)
def test_a_use_of_the_stage_encodes_as_it_trains_and_one_stream_alone_is_the_latent_itself(stage_of, streams):
    stage, images = stage_of("decoder", streams=streams), images_of()["images"]
    disturb(stage.model)
    assert torch.equal(Forward(stage, TINY).encode(images), latent_of(stage.model, streams, images))


@pytest.mark.parametrize("streams", STREAMS)
def test_what_is_left_out_has_no_parameters_and_changes_no_other(stage_of, streams):
    whole, model = stage_of("init").model.state_dict(), stage_of("init", streams=streams).model
    assert {name for name, _ in model.named_children()} & PARTS["dual"] == PARTS[streams]
    assert all(torch.equal(weight, whole[name]) for name, weight in model.state_dict().items())


TRAINED = [
    ("init", {}, PARTS["dual"]),
    ("decoder", {}, PARTS["dual"] | {"decoder"}),
    ("encoder", {}, PARTS["dual"] | {"decoder", "vision_tower", "projector"}),
    ("encoder", {"encoder": "frozen"}, PARTS["dual"] | {"decoder"}),
    ("encoder", {"streams": "semantic"}, {"semantic_stream", "decoder", "vision_tower", "projector"}),
    ("encoder", {"streams": "pixel"}, {"pixel_stream", "decoder", "vision_tower", "projector"}),
]


@pytest.mark.parametrize(
    ("phase", "changes", "trained"), TRAINED, ids=[f"{phase}-{changes}" for phase, changes, _ in TRAINED]
)
def test_two_steps_move_what_trains_and_not_a_bit_of_what_is_frozen(stage_of, phase, changes, trained):
    stage = stage_of(phase, **changes)
    before = copy.deepcopy(stage.model.state_dict())
    train(stage)
    for name, weight in stage.model.state_dict().items():
        assert torch.equal(weight, before[name]) == (name.split(".")[0] not in trained), name


@pytest.mark.parametrize("encoder", ["trained", "frozen"])
def test_the_group_of_the_encoder_has_its_own_rate_and_may_be_named_when_it_is_frozen(stage_of, encoder):
    stage = stage_of("encoder", **({"encoder": "frozen"} if encoder == "frozen" else {}))
    groups = parameter_groups(stage, OptimizerConfig(lr=1e-3, groups={"encoder": 0.1}))
    rates = {id(p): group["multiplier"] for group in groups for p in group["params"]}
    expected = {
        id(p): 0.1 if name.startswith(("vision_tower.", "projector.")) else 1.0
        for name, p in stage.model.named_parameters()
        if p.requires_grad
    }
    assert rates == expected and (0.1 in rates.values()) == (encoder == "trained")


def test_the_initial_encoder_is_the_encoder_at_the_start_and_stays_so_while_that_moves(stage_of):
    stage = stage_of("encoder")
    model = stage.model
    start = {part: copy.deepcopy(model.get_submodule(part).state_dict()) for part in ("vision_tower", "projector")}
    train(stage)
    for part, weights in start.items():
        now = model.get_submodule(part).state_dict()
        kept = model.initial_encoder.get_submodule(part).state_dict()
        assert kept.keys() == weights.keys()
        assert all(torch.equal(kept[name], weight) for name, weight in weights.items())
        assert not any(torch.equal(now[name], weight) for name, weight in weights.items())


def test_semantic_distillation_by_hand(stage_of):
    stage, batch = stage_of("encoder"), images_of()
    model, column = stage.model, list(stage.terms).index("semantic_distillation")
    assert program_of(stage)(batch)[:, column].tolist() == [0.0, 0.0]
    before = features_of(model, batch["images"])
    disturb(model.vision_tower, model.projector)
    after = features_of(model, batch["images"])
    found = program_of(stage)(batch)[:, column]
    expected = torch.stack([((after[b] - before[b]) ** 2).sum() / (16 * 128) for b in range(2)])
    assert (expected > 1e-4).all()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_pixel_alignment_by_hand_where_only_the_pixel_stream_remains(stage_of):
    stage, batch = stage_of("init", streams="pixel"), images_of()
    model = stage.model
    teacher = model.pixel_encoder(batch["images"] * 2 - 1)
    expected = (latent_of(model, "pixel", batch["images"]) - teacher).square().mean((1, 2, 3))
    found = program_of(stage)(batch)[:, list(stage.terms).index("pixel_alignment")]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


RECONSTRUCTION = {"mean_squared_error": 1.0, "gradient_difference": 0.1}
SWITCHED = [
    ("init", {}, {"pixel_alignment": 1.0}),
    ("init", {"pixel_alignment_weight": 0.5}, {"pixel_alignment": 0.5}),
    ("init", {"pixel_alignment": False}, {}),
    ("init", {"streams": "semantic"}, {}),
    ("decoder", {}, {}),
    ("encoder", {}, {"semantic_distillation": 1.0}),
    ("encoder", {"semantic_distillation_weight": 2.0}, {"semantic_distillation": 2.0}),
    ("encoder", {"semantic_distillation_weight": 0.0}, {}),
    ("encoder", {"semantic_distillation": False}, {}),
    ("encoder", {"streams": "pixel"}, {"semantic_distillation": 1.0}),
    ("encoder", {"encoder": "frozen"}, {}),
]


@pytest.mark.parametrize(("phase", "changes", "expected"), SWITCHED, ids=str)
def test_a_loss_that_is_switched_off_goes_with_its_teacher(stage_of, phase, changes, expected):
    stage = stage_of(phase, **changes)
    assert stage.terms == RECONSTRUCTION | expected
    teachers = {"pixel_alignment": "pixel_encoder", "semantic_distillation": "initial_encoder"}
    children = {name for name, _ in stage.model.named_children()}
    assert children & set(teachers.values()) == {teachers[term] for term in expected}


@pytest.mark.parametrize("streams", STREAMS)
def test_each_phase_has_all_that_the_one_before_trained(stage_of, streams):
    for parent, child in [("init", "decoder"), ("decoder", "encoder")]:
        trained = {n: p.shape for n, p in stage_of(parent, streams=streams).model.named_parameters() if p.requires_grad}
        own = {n: p.shape for n, p in stage_of(child, streams=streams).model.named_parameters()}
        assert trained and trained.items() <= own.items()


@pytest.mark.parametrize(("phase", "streams"), [("init", "pixel"), ("encoder", "semantic"), ("encoder", "pixel")])
def test_every_boundary_can_be_cut_and_the_gradients_are_bit_equal(stage_of, phase, streams):
    stage, batch = stage_of(phase, streams=streams), images_of()
    disturb(stage.model)
    program = program_of(stage)
    program(batch).sum().backward()
    expected = {n: p.grad.clone() for n, p in stage.model.named_parameters() if p.grad is not None}
    assert expected.keys() == {n for n, p in stage.model.named_parameters() if p.requires_grad}
    for cut in range(1, len(stage.layers)):
        stage.model.zero_grad()
        live = run(stage.layers[:cut], batch, program.boundaries[: cut + 1])
        names = program.boundaries[cut]
        sent = pack(live, names)
        received = [t.detach().requires_grad_(t.is_floating_point()) for t in sent]
        live = run(stage.layers[cut:], unpack(received, names), program.boundaries[cut:])
        torch.stack([live[name] for name in stage.terms], 1).sum().backward()
        floats = [(s, r) for s, r in zip(sent, received, strict=True) if s.is_floating_point()]
        assert all(r.grad is not None for _, r in floats), (cut, names)
        if floats:
            torch.autograd.backward([s for s, _ in floats], [r.grad for _, r in floats])
        for name, parameter in stage.model.named_parameters():
            if name in expected:
                assert parameter.grad is not None and torch.equal(parameter.grad, expected[name]), (cut, name)


def run(layers, slots, boundaries):
    live = {name: slots[name] for name in boundaries[0]}
    for layer, keep in zip(layers, boundaries[1:], strict=False):
        live = run_layer(layer, live, keep)
    return live


def test_an_encoder_that_trains_from_random_weights_is_said(stage_of, caplog):
    with caplog.at_level(logging.WARNING, logger="spar_scale"):
        stage_of("encoder")
    assert [record.message for record in caplog.records] == [
        "model.pretrained.mllm is not given: the part is initialised from seed 0, and this phase trains it"
    ]


UNREAD = [
    (
        "init",
        {"encoder": "frozen"},
        "model.encoder: .*tokenizer/init does not read it .only tokenizer/encoder and tokenizer/high_resolution would",
    ),
    ("init", {"semantic_distillation": False}, "model.semantic_distillation: "),
    ("decoder", {"pixel_alignment": False}, "model.pixel_alignment: .*only tokenizer/init would"),
    ("decoder", {"pixel_alignment_weight": 0.5}, "objective.pixel_alignment_weight: "),
    ("decoder", {"semantic_distillation_weight": 0.5}, "objective.semantic_distillation_weight: "),
]


@pytest.mark.parametrize(("phase", "changes", "message"), UNREAD, ids=str)
def test_a_key_that_the_phase_does_not_read_is_refused(stage_of, phase, changes, message):
    with pytest.raises(ValueError, match=message):
        stage_of(phase, **changes)
