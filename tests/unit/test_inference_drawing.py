"""Drawing with parts of a stage's forward against its whole list of layers, and what a picture depends on."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from packed import packed
from tiny_parts import TINY, make_parts, parts_of

from parallel.program import Program
from spar_scale.data.prompts import miniature_text
from spar_scale.inference.drawing import edit, generate
from spar_scale.inference.routes import route, routes_picture, routes_table
from spar_scale.inference.sampler import seeded_noise
from spar_scale.objectives.flow_matching import noisy_latents, timesteps, velocity_error
from spar_scale.stages import build
from spar_scale.stages.forward import Forward

SAMPLING = replace(TINY.sampling, steps=3)
TEXT = miniature_text()
CAPTIONS = ["a red circle on the left", "two blue squares"]
EDITS = ["make the circle blue", "remove the red square"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("parts"))


def stage_of(parts, stage, phase, routing="dynamic", shift=1.0) -> Any:
    chosen = {"preset": "tiny", "image_size": None, "routing": routing, "alignment": "self"}
    model = SimpleNamespace(**chosen, pretrained=parts_of(stage, phase, parts))
    objective = SimpleNamespace(
        align_weight=0.5, align_block=3, caption_dropout=0.1, timestep_shift=shift, adversarial_weight=0
    )
    data = SimpleNamespace(long_captions="cut")
    settings = {"stage": stage, "phase": phase, "seed": 0, "run_dir": ".", "precision": "fp32"}
    recipe: Any = SimpleNamespace(**settings, model=model, objective=objective, data=data)
    return build(recipe)


def forward_of(stage) -> Forward:
    stage.model.eval()
    return Forward(stage, TINY)


@pytest.fixture
def joint(parts) -> Forward:
    stage = stage_of(parts, "align", "joint")
    with torch.no_grad():  # a gate that chooses, where the one of the seed is nearly even
        for parameter in stage.model.routing.gate.parameters():
            parameter.mul_(4)
    return forward_of(stage)


def images(*shape):
    return torch.rand(*shape, 3, TINY.image_size, TINY.image_size, generator=torch.Generator().manual_seed(1))


def batch_of(prompts, pictures):
    return {
        "images": images(2, pictures),
        **packed(prompts),
        "latent_noise": seeded_noise(TINY.latent_shape, [5, 6]),
        "timestep_draw": torch.tensor([-1.0, 0.5]),
    }


@pytest.mark.parametrize(
    ("stage", "phase", "task", "shift"),
    [("align", "joint", "generation", 1.0), ("align", "joint", "editing", 3.0),
     ("align", "connector", "generation", 3.0), ("bootstrap", "diffusion", "generation", 3.0)],
)  # fmt: skip
def test_velocity_is_that_of_the_layers(parts, stage, phase, task, shift):
    built = stage_of(parts, stage, phase, shift=shift)
    edits = task == "editing"
    prompts = (
        [TEXT.editing_prompt(said, 16) for said in EDITS]
        if edits
        else [TEXT.generation_prompt(said) for said in CAPTIONS]
    )
    batch = batch_of(prompts, 2 if edits else 1)
    terms = Program(built.layers, built.inputs, list(built.terms))(batch)
    model = forward_of(built)
    latents = model.encode(batch["images"][:, 0]) * built.latent_scale
    timestep = timesteps(batch["timestep_draw"], shift)
    noisy = noisy_latents(latents, batch["latent_noise"], timestep)
    captions, bounds = model.condition(prompts, batch["images"][:, 1] if edits else None)
    velocity = model.velocity(noisy, timestep, captions, bounds)
    expected = terms[:, list(built.terms).index("flow_matching")]
    torch.testing.assert_close(velocity_error(velocity, latents, batch["latent_noise"]), expected, rtol=1e-5, atol=1e-6)
    if edits:
        captions, bounds = model.condition(prompts, batch["images"][:, 1].flip(3))
        other = velocity_error(model.velocity(noisy, timestep, captions, bounds), latents, batch["latent_noise"])
        assert not torch.allclose(other, expected, rtol=1e-5)


def test_prompts_are_drawn_alike_together_and_alone(joint):
    model, noise, pictures = joint, seeded_noise(TINY.latent_shape, [0, 1]), images(2)
    together = generate(model, CAPTIONS, noise, SAMPLING)
    edited = edit(model, pictures, EDITS, noise, SAMPLING)
    for place in range(2):
        here = slice(place, place + 1)
        alone = generate(model, CAPTIONS[here], noise[here], SAMPLING)
        torch.testing.assert_close(together[here], alone, rtol=0, atol=1e-5)
        alone = edit(model, pictures[here], EDITS[here], noise[here], SAMPLING)
        torch.testing.assert_close(edited[here], alone, rtol=0, atol=1e-5)


def test_an_edit_depends_on_the_picture_under_any_guidance(joint):
    model, noise = joint, seeded_noise(TINY.latent_shape, [0])
    for guidance in (0.0, 2.5):  # at 0 the bare branch alone is drawn, which keeps the picture
        sampling = replace(SAMPLING, guidance=guidance)
        one, other = (edit(model, picture, EDITS[:1], noise, sampling) for picture in images(2).split(1))
        assert (one - other).abs().max() > 1e-4
    bare = replace(SAMPLING, guidance=0.0)
    words = [edit(model, images(1), [said], noise, bare) for said in EDITS]
    torch.testing.assert_close(words[0], words[1], rtol=0, atol=1e-5)


def test_an_altered_router_changes_the_picture(joint):
    model, noise = joint, seeded_noise(TINY.latent_shape, [0])
    before = generate(model, CAPTIONS[:1], noise, SAMPLING)
    with torch.no_grad():
        model.stage.model.get_parameter("routing.gate.2.bias").copy_(torch.tensor([4.0, 0, 0, -4]))
    assert (generate(model, CAPTIONS[:1], noise, SAMPLING) - before).abs().max() > 1e-3


@pytest.mark.parametrize("pictured", [False, True], ids=["words", "picture"])
def test_routes_sum_to_one_and_are_those_that_draw(joint, pictured):
    model, source = joint, images(1) if pictured else None
    routing: Any = model.stage.model.get_submodule("routing")
    prompt = TEXT.editing_prompt(EDITS[0], 16) if pictured else TEXT.generation_prompt(CAPTIONS[0])
    used = []
    inner = routing.weights
    routing.weights = lambda states: used.append(inner(states)) or used[-1]
    model.condition([prompt], source)
    del routing.weights
    routes = route(model, prompt, source)
    assert routes.layers == (2, 4, 6, 8)
    assert routes.weights.shape == (len(prompt) + 16, 4)
    torch.testing.assert_close(routes.weights.sum(1), torch.ones(len(routes.weights)))
    torch.testing.assert_close(routes.weights, used[0])
    assert routes.weights.std(0).min() > 0.01  # tokens choose differently
    assert int(routes.is_picture.sum()) == (16 if pictured else 0) and int(routes.is_query.sum()) == 16


def test_routes_are_shown_word_by_word_and_as_grids(joint):
    routes = route(joint, TEXT.generation_prompt(CAPTIONS[0]))
    lines = routes_table(routes).splitlines()
    assert [line.split()[0] for line in lines[1:-2]] == ["<bos>", "draw", ":", *CAPTIONS[0].split(), "<img>"]
    red = [float(number) for number in lines[5].split()[1:]]
    assert lines[5].startswith("red ") and red == pytest.approx(routes.weights[4].tolist(), abs=6e-4)
    assert lines[0].split() == ["token", *(word for layer in routes.layers for word in ("layer", str(layer)))]
    drawn = []
    for place in (0, 3):  # the last query takes the first layer, then the last: two squares and their means differ
        routes.weights[-1] = torch.eye(4)[place]
        drawn.append(np.array(routes_picture(routes), dtype=int))
    rows, columns = np.nonzero((drawn[0] != drawn[1]).any(axis=2))
    grids = rows > drawn[0].shape[0] / 2
    assert grids.sum() > 2 * 500  # two of the 4 x 4 squares of 28 pixels
    assert columns[grids].max() - columns[grids].min() > 300


@pytest.mark.parametrize(("kind", "states"), [("uniform", 4), ("last_layer", 1)])
def test_routes_of_the_ablations(parts, kind, states):
    routes = route(forward_of(stage_of(parts, "align", "joint", kind)), TEXT.generation_prompt(CAPTIONS[0]))
    assert torch.equal(routes.weights, torch.full((len(routes.weights), states), 1 / states))
    assert routes_picture(routes).width > 200
