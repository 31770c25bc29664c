"""Stages 2 and 3: what trains, what the switches leave out, and both terms worked out again from the model's parts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel
from packed import batch_of as together
from packed import packed, samples
from tiny_parts import TINY, encode, make_parts
from tiny_runs import phase_values
from torch import Tensor

from parallel.errors import UserError
from parallel.program import Program, Subprogram
from spar_scale.config.recipe import Recipe
from spar_scale.data.prompts import TOKENS, miniature_text
from spar_scale.models.presets import PRESETS, resized
from spar_scale.models.published import PretrainedPart
from spar_scale.models.spar.layers import RouteTokens
from spar_scale.stages import Stage, build
from spar_scale.stages.align import Alignment
from spar_scale.stages.forward import Forward

CASES = [
    ("align/connector", "generation"),
    ("align/joint", "generation"),
    ("align/joint", "editing"),
    ("instruct/joint", "editing"),
]
CONDITIONING = {"queries", "routing", "connector"}
TRAINED = {
    "align/connector": CONDITIONING,
    "align/joint": CONDITIONING | {"diffusion", "alignment_head"},
    "instruct/joint": CONDITIONING | {"diffusion", "alignment_head"},
}
FROZEN = {"language_model", "lm_head", "tokenizer"}
WORDS = {
    "generation": ["a red circle", "two blue squares", "a cyan square on the left"],
    "editing": ["make the circle blue", "remove the square", "turn the circle into a square"],
}
TIGHT: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, str]:
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def fresh(parts):
    """Build a phase from a real recipe; keys are dotted, with `__` for the dot."""

    def stage(phase: str, **changes: Any) -> Stage:
        values = phase_values(Path("runs/x"), phase, Path("data"), parts, **changes)
        return build(Recipe.model_validate_json(json.dumps(values)))

    return stage


@pytest.fixture(scope="module")
def built() -> dict[str, Stage]:
    return {}


@pytest.fixture
def shared(fresh, built):
    """The same, built once: for tests that change no weight."""

    def stage(phase: str, **changes: Any) -> Stage:
        key = str((phase, sorted(changes.items())))
        if key not in built:
            built[key] = fresh(phase, **changes)
        return built[key]

    return stage


def prompts_of(task: str, size: int = 3) -> list[list[int]]:
    words = miniature_text()
    write = words.generation_prompt if task == "generation" else lambda text: words.editing_prompt(text, 16)
    return [write(text) for text in WORDS[task][:size]]


def rows_of(task: str, size: int = 3, seed: int = 0) -> list[dict[str, Tensor]]:
    """Samples with prompts of different lengths, pictures and draws."""
    generator = torch.Generator().manual_seed(seed)
    draws = {
        "images": torch.rand(size, 2 if task == "editing" else 1, 3, 32, 32, generator=generator),
        "latent_noise": torch.randn(size, 32, 4, 4, generator=generator),
        "timestep_draw": torch.randn(size, generator=generator),
    }
    prompts = packed(prompts_of(task, size))
    return samples({**prompts, **draws})


def batch_of(task: str, size: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """The same, as the loader gives them."""
    return together(rows_of(task, size, seed))


def terms_of(stage: Stage, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    values = Program(stage.layers, stage.inputs, list(stage.terms))(batch)
    return dict(zip(stage.terms, values.unbind(1), strict=True))


def model_of(stage: Stage) -> Any:
    return stage.model


def part_of(parts: dict[str, str], name: str) -> PretrainedPart:
    return PretrainedPart(name, Path(parts[name]), "tiny")


def tokenizer_of(parts: dict[str, str]) -> Any:
    return TINY.tokenizer.load(part_of(parts, "tokenizer"), TINY.vision, TINY.autoencoder)[0].eval()


def features_of(encoder: torch.nn.Module, images: Tensor) -> Tensor:
    return Subprogram(TINY.vision.feature_layers(encoder, frozen=True), ("features",))({"images": images})["features"]


def layer_of(stage: Stage, kind: type) -> Any:
    (layer,) = [layer for layer in stage.layers if isinstance(layer, kind)]
    return layer


def disturb(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def read_config(parts: dict[str, str], part: str) -> dict[str, Any]:
    return json.loads((Path(parts[part]) / "config.json").read_text())


def close(found: dict[str, Tensor], expected: dict[str, Tensor], rows: slice = slice(None)) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name][rows], **TIGHT, msg=lambda text, name=name: f"{name}: {text}")


@torch.no_grad()
def by_hand(stage: Stage, batch: dict[str, Tensor], latent: Tensor, block: int | None, teacher: Tensor | None = None):
    """Both terms from captions, the library's own diffusion transformer and plain formulas; `latent` is scaled."""
    model, images, noise = model_of(stage), batch["images"], batch["latent_noise"]
    references = images[:, 1] if images.shape[1] > 1 else None
    prompts = [tokens.tolist() for tokens in batch["tokens"].split(batch["lengths"].tolist())]
    captions, bounds = Forward(stage, TINY).condition(prompts, references)
    of_samples = captions.split(bounds.diff().tolist())
    timestep = 1000 - (1000 / (1 + torch.exp(-batch["timestep_draw"]))).floor()
    sigma = (timestep / 1000).view(-1, 1, 1, 1)
    transformer, seen = SanaTransformer2DModel(**cast(Any, TINY.diffusion).config()), []
    transformer.load_state_dict(model.diffusion.transformer.state_dict(), strict=True)
    transformer.transformer_blocks[(block or 1) - 1].register_forward_hook(lambda *call: seen.append(call[-1]))
    noisy = (1 - sigma) * latent + sigma * noise
    each = zip(noisy.split(1), of_samples, timestep.split(1), strict=True)
    velocity = torch.cat([transformer(z, c[None], t, return_dict=False)[0] for z, c, t in each])
    tapped = torch.cat(seen)
    terms = {"flow_matching": (velocity - (noise - latent)).square().sum((1, 2, 3)) / latent[0].numel()}
    if teacher is not None:
        student = model.alignment_head(tapped)
        cosine = (student * teacher).sum(2) / (student.square().sum(2) * teacher.square().sum(2)).sqrt()
        terms["alignment"] = -cosine.mean(1)
    return terms


@pytest.mark.parametrize(("phase", "task"), CASES)
def test_a_step_moves_every_weight_that_trains_and_not_a_bit_of_what_is_frozen(fresh, phase, task):
    stage = fresh(phase)
    before = copy.deepcopy(stage.model.state_dict())
    assert {name for name, _ in stage.model.named_children()} == FROZEN | TRAINED["align/joint"] - (
        {"alignment_head"} if phase == "align/connector" else set()
    )
    optimizer = torch.optim.AdamW([p for p in stage.model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    stage.model.train()
    torch.stack(
        [stage.terms[name] * value.mean() for name, value in terms_of(stage, batch_of(task)).items()]
    ).sum().backward()
    optimizer.step()
    for name, weight in stage.model.state_dict().items():
        assert torch.equal(weight, before[name]) == (name.split(".")[0] not in TRAINED[phase]), name


@pytest.mark.parametrize("phase", ["align/connector", "align/joint"])
def test_what_is_pretrained_starts_as_it_was_read(shared, parts, phase):
    model = model_of(shared(phase))
    diffusion = TINY.diffusion.load(part_of(parts, "diffusion")).state_dict()
    assert all(torch.equal(weight, diffusion[name]) for name, weight in model.diffusion.state_dict().items())
    if phase == "align/joint":
        tokenizer = tokenizer_of(parts).state_dict()
        assert all(torch.equal(weight, tokenizer[name]) for name, weight in model.tokenizer.state_dict().items())


@pytest.mark.parametrize("copies", [True, False])
def test_the_connector_starts_as_the_last_layers_where_the_preset_says_so(fresh, monkeypatch, copies):
    monkeypatch.setitem(PRESETS, "tiny", resized(TINY, name="tiny", conditioning={"connector_copies": copies}))
    model = model_of(fresh("align/connector"))
    language = model.language_model.state_dict()
    matrices = 0
    for name, weight in model.connector.layers.state_dict().items():
        number, rest = name.split(".", 1)
        if weight.dim() == 2:
            assert torch.equal(weight, language[f"layers.{8 - 2 + int(number)}.{rest}"]) == copies, name
            matrices += 1
    assert matrices == 14
    assert not {p.data_ptr() for p in model.connector.parameters()} & {w.data_ptr() for w in language.values()}


ROUTING = {"dynamic": (2, 4, 6, 8), "uniform": (2, 4, 6, 8), "last_layer": (8,)}


@pytest.mark.parametrize("kind", ROUTING)
def test_the_kind_of_routing_decides_which_weights_exist_and_which_states_are_read(shared, kind):
    stage, sampled = shared("align/joint", model__routing=kind), ROUTING[kind]
    model = model_of(stage)
    gate = {"gate.0.weight", "gate.0.bias", "gate.2.weight", "gate.2.bias"} if kind == "dynamic" else set()
    kept = {"scales", "norm.weight", "norm.bias", "projection.weight", "projection.bias"}
    assert {name for name, _ in model.routing.named_parameters()} == kept | gate
    assert model.routing.scales.shape == (len(sampled),)
    states = {f"{part}_state_{k}" for part in ("prefix", "query") for k in sampled}
    assert set(layer_of(stage, RouteTokens).reads) == states | {"prefix_state_0", "tokens", "caption_order"}
    of_queries = {name for layer in stage.layers for name in layer.writes if name.startswith("query_state_")}
    assert of_queries == {name for name in states if name.startswith("query")}
    other = model_of(shared("align/joint"))
    for name, weight in model.routing.named_parameters():
        assert weight.shape != other.routing.get_parameter(name).shape or torch.equal(
            weight, other.routing.get_parameter(name)
        )


def test_the_kinds_of_routing_draw_different_pictures(shared):
    values = [terms_of(shared("align/joint", model__routing=kind), batch_of("generation")) for kind in ROUTING]
    assert len({value["flow_matching"][0].item() for value in values}) == 3


@pytest.mark.parametrize("change", [{"model__alignment": "none"}, {"objective__align_weight": 0}], ids=str)
def test_without_alignment_the_head_and_the_term_are_gone_and_the_rest_is_as_before(shared, change):
    stage, aligned = shared("align/joint", **change), shared("align/joint")
    assert stage.terms == {"flow_matching": 1.0} and aligned.terms == {"flow_matching": 1.0, "alignment": 0.5}
    assert not any(isinstance(layer, Alignment) for layer in stage.layers)
    without = dict(stage.model.named_parameters())
    kept = {n: w for n, w in aligned.model.named_parameters() if not n.startswith("alignment_head.")}
    assert len(kept) < len(dict(aligned.model.named_parameters())) and without.keys() == kept.keys()
    batch = batch_of("generation")
    assert torch.equal(terms_of(stage, batch)["flow_matching"], terms_of(aligned, batch)["flow_matching"])


@pytest.mark.parametrize("change", [{"model__alignment": "none"}, {"objective__align_weight": 0}], ids=str)
def test_a_block_that_nothing_taps_is_not_checked(fresh, change):
    assert fresh("align/joint", objective__align_block=7, **change).terms == {"flow_matching": 1.0}


def test_a_block_beyond_the_last_is_refused(fresh):
    with pytest.raises(UserError) as refusal:
        fresh("align/joint", objective__align_block=7)
    assert str(refusal.value) == (
        "objective.align_block: found 7; the diffusion transformer of preset 'tiny' has blocks 1 to 6"
    )


def test_an_external_teacher_must_be_named_and_only_it_may(fresh, parts):
    with pytest.raises(UserError, match=r"^model\.pretrained\.teacher: stage 'align', phase 'joint' starts from this"):
        fresh("align/joint", model__alignment="external")
    with pytest.raises(UserError, match=r"^model\.pretrained\.teacher: .* takes mllm, tokenizer, diffusion"):
        fresh("align/joint", model__pretrained__teacher=parts["mllm"])


@pytest.mark.parametrize("block", [1, 3, 6])
@pytest.mark.parametrize("task", WORDS)
def test_both_terms_by_hand(shared, parts, task, block):
    stage, batch = shared("align/joint", objective__align_block=block), batch_of(task)
    tokenizer, target = tokenizer_of(parts), batch["images"][:, 0]
    with torch.no_grad():
        latent = encode(tokenizer, TINY, target) * read_config(parts, "tokenizer")["latent_scale"]
        teacher = features_of(tokenizer, target)
    expected = by_hand(stage, batch, latent, block, teacher)
    close(terms_of(stage, batch), expected)
    assert expected["alignment"].abs().min() > 1e-3 and expected["flow_matching"].min() > 0.1


def test_the_connector_phase_draws_in_the_autoencoders_latent_times_its_scale(shared, parts):
    stage, batch = shared("align/connector"), batch_of("generation")
    with torch.no_grad():
        latent = model_of(stage).tokenizer.get_submodule("encoder")(batch["images"][:, 0] * 2 - 1)
    latent = latent * read_config(parts, "pixel_autoencoder")["scaling_factor"]
    assert latent.std().item() == pytest.approx(1, abs=0.2)
    close(terms_of(stage, batch), by_hand(stage, batch, latent, None))


def test_an_external_teacher_is_the_one_that_is_followed(fresh, parts):
    stage = fresh("align/joint", model__alignment="external", model__pretrained__teacher=parts["mllm"])
    model, batch = model_of(stage), batch_of("editing")
    target = batch["images"][:, 0]
    with torch.no_grad():
        teacher = features_of(TINY.vision.load(part_of(parts, "mllm")).eval(), target)
        for disturbed in (None, model.tokenizer, model.diffusion):
            if disturbed is not None:
                disturb(disturbed)
            before = terms_of(stage, batch)
            latent = encode(model.tokenizer, TINY, target) * stage.latent_scale
            close(before, by_hand(stage, batch, latent, 3, teacher))
        disturb(model.teacher)
        after = terms_of(stage, batch)
    assert torch.equal(after["flow_matching"], before["flow_matching"])
    assert ((after["alignment"] - before["alignment"]).abs() > 1e-4).all()
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())


def values_and_gradients(stage: Stage, rows: list[dict[str, Tensor]], only: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The terms of one of the samples, and the gradients of their sum."""
    stage.model.zero_grad()
    values = Program(stage.layers, stage.inputs, list(stage.terms))(together(rows))
    assert values.isfinite().all()
    values[only].sum().backward()
    return values[only], {n: p.grad.clone() for n, p in stage.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("phase", "task"), CASES[:3])
def test_each_sample_between_others_is_the_sample_alone_in_values_and_gradients(fresh, phase, task):
    stage, rows, others = fresh(phase), rows_of(task), rows_of(task, seed=1)
    empty = {name: torch.zeros_like(value) for name, value in rows[0].items()}
    empty |= {"tokens": torch.zeros(1, dtype=torch.int64), "lengths": torch.tensor(1)}  # as of a bad sample
    for row in range(3):
        alone, gradients = values_and_gradients(stage, [rows[row]], 0)
        for beside, place in ((rows, row), ([others[2], rows[row], others[0]], 1), ([rows[row], empty], 0)):
            found, also = values_and_gradients(stage, beside, place)
            torch.testing.assert_close(found, alone, rtol=1e-6, atol=1e-6)
            for name, gradient in gradients.items():
                assert (also[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8, name


def test_the_picture_to_edit_is_read_and_put_back_after_the_routing(shared):
    stage, batch = shared("align/joint"), batch_of("editing")
    model, seen = model_of(stage), []
    hook = layer_of(stage, RouteTokens).register_forward_hook(lambda _, __, written: seen.append(written["captions"]))
    other = {**batch, "images": torch.stack([batch["images"][:, 0], batch["images"][:, 1].flip(0)], 1)}
    before, after = terms_of(stage, batch), terms_of(stage, other)
    hook.remove()
    for name in stage.terms:
        assert (before[name] != after[name])[[0, 2]].all(), name
        torch.testing.assert_close(before[name][1], after[name][1], **TIGHT)  # whose picture stayed
    with torch.no_grad():
        reference = features_of(model.tokenizer, batch["images"][:, 1])
    tokens, lengths = batch["tokens"], batch["lengths"]
    wholes = seen[0].split((lengths + TINY.conditioning.num_queries).tolist())
    for row, (prompt, captions) in enumerate(zip(tokens.split(lengths.tolist()), wholes, strict=True)):
        place, words = prompt == TOKENS["<IMG_CONTEXT>"], captions[: len(prompt)]
        assert place.sum() == 16
        torch.testing.assert_close(words[place], reference[row], **TIGHT)
        embedded = model.language_model.embed_tokens(prompt)
        assert not torch.isclose(words[~place], embedded[~place]).all(1).any()
