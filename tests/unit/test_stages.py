"""Stages: the list of layers against the libraries' own forward, frozen parts, parts read from disk."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from safetensors.torch import load_file, save_file
from tiny_parts import make_parts, parts_of
from transformers import InternVLForConditionalGeneration, Qwen2Config

from parallel.errors import UserError
from parallel.program import Program, pack, run_layer, unpack
from spar_scale.data.tasks import find_task
from spar_scale.models.initialise import initialise
from spar_scale.models.internvl.vision import vision_config
from spar_scale.models.presets import PRESETS
from spar_scale.objectives.reconstruction import gradient_difference, mean_squared_error
from spar_scale.ops import attention
from spar_scale.phases import declared
from spar_scale.stages import build
from spar_scale.stages.forward import Forward

TINY: Any = PRESETS["tiny"]


def recipe_of(stage, phase, run_dir=".", pretrained=None, preset="tiny", **objective) -> Any:
    defaults = {"perceptual_weight": 0.1, "latent_noise": 0.1, "latent_power_weight": 1e-3, "pixel_alignment_weight": 1,
                "align_weight": 0.5, "align_block": 3, "caption_dropout": 0.1, "timestep_shift": 1.0,
                "adversarial_weight": 0, "perceptual": "gradient_difference"}  # fmt: skip
    return SimpleNamespace(
        stage=stage, phase=phase, seed=0, run_dir=Path(run_dir), precision="fp32",
        model=SimpleNamespace(preset=preset, pretrained=pretrained or {}, routing="dynamic", alignment="self",
                              image_size=None),
        objective=SimpleNamespace(**{**defaults, **objective}),
        data=SimpleNamespace(long_captions="cut"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A directory with an autoencoder in the published layout, away from zero so that it matters."""
    directory = tmp_path_factory.mktemp("published")
    stage = build(recipe_of("bootstrap", "autoencoder"))
    initialise(stage.model, seed=7)
    TINY.autoencoder.save(stage.model, directory)
    return directory


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(params=[(one.training_stage, one.phase) for one in declared()], ids="-".join)
def stage(request, parts):
    name, phase = request.param
    return build(recipe_of(name, phase, pretrained=parts_of(name, phase, parts)))


def batch_of(stage, size=2, task=None):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.arange(7, 7 + size)
    batch = {"lengths": lengths}
    for name, (shape, dtype) in find_task(task or stage.sample.task).slots(stage.sample).items():
        if shape is None:
            high, kind = (62, torch.int64) if dtype is np.int64 else (2, torch.uint8)
            batch[name] = torch.randint(high, (int(lengths.sum()),), generator=generator, dtype=kind)
        elif dtype is np.float32:
            batch[name] = torch.rand(size, *shape, generator=generator)
        else:  # labels
            batch[name] = torch.randint(2, (size, *shape), generator=generator, dtype=torch.uint8)
    for name, draw in stage.sample.draws.items():
        batch[name] = torch.randn(size, *draw.shape, generator=generator)
    return batch


def test_every_stage_is_a_consistent_program_that_reads_what_its_sample_carries(stage):
    program = Program(stage.layers, stage.inputs, list(stage.terms))
    assert set(stage.inputs) <= batch_of(stage).keys()
    assert program(batch_of(stage)).shape == (2, len(stage.terms))


USED_LATER = ("lm_head", "tokenizer.decoder")
"""Frozen parts that no layer holds: for answers, for pictures."""


def test_layers_hold_the_models_parameters_and_none_twice_but_the_frozen_language_models(stage):
    """A layer of that stands for the prompt and, right behind, for the queries."""
    places: dict[int, list[int]] = {}
    for number, layer in enumerate(stage.layers):
        for parameter in layer.parameters():
            places.setdefault(id(parameter), []).append(number)
    own = {id(p): name for name, p in stage.model.named_parameters()}
    assert places.keys() <= own.keys()
    for key, (first, *again) in places.items():
        frozen = own[key].startswith("language_model.") and stage.group_of(own[key]) is None
        assert not again or (frozen and again == [first + 1]), own[key]
    left = [name for key, name in own.items() if key not in places]
    assert all(name.startswith(USED_LATER) and stage.group_of(name) is None for name in left), left


def test_no_attention_of_a_phase_has_a_mask(stage, monkeypatch):
    """So the kernels that read none (flash-attn 2, 3 and 4, torch's packed one) compute all of it."""
    kinds = []
    chosen = attention.resolve

    def watched(device, dtype, *, masked=False, **given):
        kinds.append(masked)
        return chosen(device, dtype, masked=masked, **given)

    monkeypatch.setattr(attention, "resolve", watched)
    Program(stage.layers, stage.inputs, list(stage.terms))(batch_of(stage))
    assert not any(kinds)


def test_exactly_the_parameters_in_groups_get_a_gradient_and_frozen_parts_are_in_eval_mode(stage):
    batch = batch_of(stage)
    Program(stage.layers, stage.inputs, list(stage.terms)).train()(batch).sum().backward()
    for name, parameter in stage.model.named_parameters():
        trains = stage.group_of(name) is not None
        assert parameter.requires_grad == trains and (parameter.grad is not None) == trains, name
    for module in (stage.model.train(), *stage.layers):
        for name, part in module.named_modules():
            parameters = list(part.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                assert not part.training, name


def test_every_boundary_can_be_cut_and_the_gradients_stay(stage):
    """Each float slot at a boundary travels as integers or gets a gradient from the layers behind it.

    Equal to rounding: where a slot is read on both sides, a cut changes the order of the sum.
    """
    batch = batch_of(stage)
    program = Program(stage.layers, stage.inputs, list(stage.terms))
    program(batch).sum().backward()
    expected = {n: p.grad.clone() for n, p in stage.model.named_parameters() if p.grad is not None}
    for cut in range(1, len(stage.layers)):
        stage.model.zero_grad()
        live = {name: batch[name] for name in program.boundaries[0]}
        for layer, keep in zip(stage.layers[:cut], program.boundaries[1 : cut + 1], strict=True):
            live = run_layer(layer, live, keep)
        names = program.boundaries[cut]
        sent = pack(live, names)
        received = [t.detach().requires_grad_(t.is_floating_point()) for t in sent]
        live = unpack(received, names)
        for layer, keep in zip(stage.layers[cut:], program.boundaries[cut + 1 :], strict=True):
            live = run_layer(layer, live, keep)
        torch.stack([live[name] for name in stage.terms], 1).sum().backward()
        floats = [(name, s, r) for name, s, r in zip(names, sent, received, strict=True) if s.is_floating_point()]
        assert all(r.grad is not None for _, _, r in floats), [n for n, _, r in floats if r.grad is None]
        if floats:
            torch.autograd.backward([s for _, s, _ in floats], [r.grad for _, _, r in floats])
        for name, parameter in stage.model.named_parameters():
            if name in expected:
                assert parameter.grad is not None, (cut, name)
                distance = (parameter.grad - expected[name]).norm()
                assert distance <= 2e-6 * expected[name].norm(), (cut, name, distance)


def test_the_tokenizers_layers_equal_the_libraries_around_the_streams(published):
    stage = build(recipe_of("tokenizer", "init", pretrained={"pixel_autoencoder": str(published)}))
    model: Any = stage.model
    with torch.no_grad():  # away from the start, where the fusion is the identity
        model.fusion.linear_2.weight.normal_(generator=torch.Generator().manual_seed(3))
    batch = batch_of(stage)
    terms = Program(stage.layers, stage.inputs, list(stage.terms))(batch)
    images = batch["images"]
    tower = model.vision_tower(images.sub(torch.tensor([[0.485], [0.456], [0.406]])[..., None]).div(
        torch.tensor([[0.229], [0.224], [0.225]])[..., None])).last_hidden_state  # fmt: skip
    features = model.projector(tower[:, 1:])  # nothing to fold: a patch is a token
    hidden = features
    for layer in model.pixel_stream.layers:
        hidden = layer(hidden)
    pixel_latent = model.pixel_stream.head(model.pixel_stream.blocks(hidden))
    fused = model.fusion(model.semantic_stream(features), pixel_latent)
    latent = fused.transpose(1, 2).contiguous().view(2, 32, 4, 4)
    autoencoder = AutoencoderDC.from_pretrained(str(published), low_cpu_mem_usage=False)
    (decoded,) = autoencoder.decode(latent + 0.1 * batch["latent_noise"], return_dict=False)
    assert torch.equal(terms[:, 0], mean_squared_error((decoded + 1) / 2, images))
    assert torch.equal(terms[:, 1], gradient_difference((decoded + 1) / 2, images))
    teacher = autoencoder.encoder(images * 2 - 1)
    expected = (pixel_latent.transpose(1, 2).view(2, 32, 4, 4) - teacher).square().mean((1, 2, 3))
    torch.testing.assert_close(terms[:, 2], expected, rtol=1e-5, atol=0)


def test_the_autoencoders_layers_equal_its_own_forward():
    stage = build(recipe_of("bootstrap", "autoencoder"))
    batch = batch_of(stage)
    terms = Program(stage.layers, stage.inputs, list(stage.terms))(batch)
    assert isinstance(stage.model, AutoencoderDC)
    (latent,) = stage.model.encode(batch["images"] * 2 - 1, return_dict=False)
    (decoded,) = stage.model.decode(latent + 0.1 * batch["latent_noise"], return_dict=False)
    decoded = (decoded + 1) / 2
    assert torch.equal(terms[:, 0], mean_squared_error(decoded, batch["images"]))
    torch.testing.assert_close(terms[:, 2], latent.square().mean((1, 2, 3)).sub(1).clamp_min(0))


def test_lambda_p_zero_leaves_the_teacher_out(published):
    given = {"pixel_autoencoder": str(published)}
    stage = build(recipe_of("tokenizer", "init", pretrained=given, pixel_alignment_weight=0))
    assert "pixel_alignment" not in stage.terms
    assert not hasattr(stage.model, "pixel_encoder")
    assert not any("teacher_latent" in layer.writes for layer in stage.layers)


def test_the_published_layout_round_trips_strictly(published, tmp_path):
    first = AutoencoderDC.from_pretrained(str(published), low_cpu_mem_usage=False)
    assert sorted(p.name for p in published.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    stage = build(recipe_of("tokenizer", "init", run_dir=tmp_path, pretrained={"pixel_autoencoder": str(published)}))
    assert stage.references == {"pixel_autoencoder": published}
    for name, weight in first.state_dict().items():
        part, rest = name.split(".", 1)
        own = stage.model.get_parameter(f"{'pixel_encoder' if part == 'encoder' else part}.{rest}")
        assert torch.equal(own, weight), name
    images = torch.rand(2, 3, 32, 32)
    (decoded,) = first.decode(first.encode(images * 2 - 1, return_dict=False)[0], return_dict=False)
    expected = ((decoded + 1) / 2).clamp(0, 1)
    trained = build(recipe_of("bootstrap", "autoencoder"))
    trained.model.load_state_dict(first.state_dict())
    assert torch.equal(Forward(trained, TINY).reconstruct(images), expected)


def test_a_whole_pipeline_of_diffusers_is_told_which_of_its_folders_is_the_part(published, tmp_path):
    shutil.copytree(published, tmp_path / "vae")
    with pytest.raises(UserError, match=r"no config\.json in .*; its folders vae have one each: name the one that is"):
        build(recipe_of("tokenizer", "init", pretrained={"pixel_autoencoder": str(tmp_path)}))


def test_relative_directories_start_at_the_run_directory(published):
    run_dir = published.parent / "some_run"
    given = {"pixel_autoencoder": f"../{published.name}"}
    assert build(recipe_of("tokenizer", "init", run_dir, given)).references == {"pixel_autoencoder": published}


def test_a_vision_tower_that_is_not_given_is_said_and_one_that_is_given_is_used(published, tmp_path, caplog):
    given = {"pixel_autoencoder": str(published)}
    with caplog.at_level(logging.WARNING, logger="spar_scale"):
        build(recipe_of("tokenizer", "init", pretrained=given))
    assert [r.message for r in caplog.records] == [
        "model.pretrained.mllm is not given: the part is initialised from seed 0 and stays frozen"
    ]
    config = vision_config(TINY.vision)
    config.text_config = Qwen2Config(
        hidden_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=8,
        vocab_size=8,
    )  # fmt: skip
    mllm = InternVLForConditionalGeneration(config)
    mllm.save_pretrained(tmp_path / "mllm")
    caplog.clear()
    stage = build(recipe_of("tokenizer", "init", pretrained={**given, "mllm": str(tmp_path / "mllm")}))
    assert not caplog.records
    for name, weight in mllm.model.vision_tower.state_dict().items():
        assert torch.equal(stage.model.get_parameter(f"vision_tower.{name}"), weight), name
    for name, weight in mllm.model.multi_modal_projector.state_dict().items():
        assert torch.equal(stage.model.get_parameter(f"projector.{name}"), weight), name
    _edit_config(tmp_path / "mllm", lambda c: c["vision_config"].update(num_hidden_layers=5))
    with pytest.raises(UserError, match=r"model\.pretrained\.mllm: .*num_hidden_layers = 5, preset 'tiny' needs 4"):
        build(recipe_of("tokenizer", "init", pretrained={**given, "mllm": str(tmp_path / "mllm")}))


def _edit_config(directory, change):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def _edit_weights(directory, change):
    path = directory / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def _truncate(directory):
    path = directory / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def _only_pickle(directory):
    path = directory / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(path), directory / "diffusion_pytorch_model.bin")
    path.unlink()


DAMAGE = {
    "a missing weight": (
        lambda d: _edit_weights(d, lambda w: w.pop("decoder.conv_in.bias")), r"missing weight decoder\.conv_in\.bias"
    ),
    "an unexpected weight": (
        lambda d: _edit_weights(d, lambda w: w.update(extra=torch.zeros(1))), "unexpected weight extra"
    ),
    "another shape": (
        lambda d: _edit_weights(d, lambda w: w.update({"decoder.conv_in.bias": torch.zeros(5)})),
        r"decoder\.conv_in\.bias",
    ),
    "another config": (
        lambda d: _edit_config(d, lambda c: c.update(latent_channels=16)),
        "latent_channels = 16, preset 'tiny' needs 32",
    ),
    "a config that is not JSON": (lambda d: (d / "config.json").write_text("{"), "cannot be read as JSON"),
    "no config": (lambda d: (d / "config.json").unlink(), "no config.json in"),
    "a truncated file": (_truncate, "the weights in .* cannot be read"),
    "no weights": (
        lambda d: (d / "diffusion_pytorch_model.safetensors").unlink(), r"holds no diffusion_pytorch_model\.safetensors"
    ),
    "a pickle only": (_only_pickle, r"holds pickled weights only \(diffusion_pytorch_model\.bin\), which are never"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_part_is_refused_by_its_key(published, tmp_path, damage):
    directory = tmp_path / "part"
    directory.mkdir()
    for file in published.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    change, message = DAMAGE[damage]
    change(directory)
    with pytest.raises(UserError, match=rf"(?s)model\.pretrained\.pixel_autoencoder: .*{message}"):
        build(recipe_of("tokenizer", "init", pretrained={"pixel_autoencoder": str(directory)}))


REFUSED = {
    "stage": (recipe_of("tokeniser", "init"), r"^stage: 'tokeniser' is not .*did you mean 'tokenizer'\?"),
    "phase": (recipe_of("tokenizer", "inti"), r"^phase: 'inti' is not a phase .*did you mean 'init'\?"),
    "preset": (
        recipe_of("bootstrap", "autoencoder", preset="tinny"), r"^model\.preset: 'tinny' .*did you mean 'tiny'\?"
    ),
    "part not given": (recipe_of("tokenizer", "init"), r"^model\.pretrained\.pixel_autoencoder: .*starts from"),
    "part not taken": (
        recipe_of("tokenizer", "init", pretrained={"pixel_autoencodr": "x"}),
        r"^model\.pretrained\.pixel_autoencodr: .*did you mean 'pixel_autoencoder'\?",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_recipe_that_cannot_be_built_is_refused_by_its_key(case):
    recipe, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        build(recipe)


def test_a_prefix_matches_whole_names_only(stage):
    group, prefixes = next(iter(stage.groups.items()))
    assert stage.group_of(f"{prefixes[0]}.weight") == group
    assert stage.group_of(f"{prefixes[0]}_2.weight") is None
