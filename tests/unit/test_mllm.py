"""The language model: its layers against the class's own forward, the loss by hand, asking."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_parts import make_parts
from tiny_runs import phase_values
from transformers import AutoTokenizer, InternVLForConditionalGeneration, Qwen2Config

from parallel.errors import UserError
from parallel.program import Program
from spar_scale.config.recipe import Recipe
from spar_scale.data.patches import NUM_LABELS, UNKNOWN
from spar_scale.data.prompts import TOKENS, miniature_text
from spar_scale.inference.ask import answer, ask
from spar_scale.models.internvl.language import Rotary, merge
from spar_scale.models.internvl.layers import PromptPositions
from spar_scale.models.internvl.model import mllm_config
from spar_scale.models.internvl.vision import normalise
from spar_scale.models.presets import PRESETS, resized
from spar_scale.models.published import PretrainedPart
from spar_scale.objectives.next_token import next_token_loss
from spar_scale.stages import build
from spar_scale.stages.bootstrap_mllm import NUM_TOKENS, NamePatches
from spar_scale.stages.forward import Forward

TINY: Any = PRESETS["tiny"]
TEXT = miniature_text()


def opening() -> Any:
    return TEXT.prompt().ask("<bos> {picture}", image_tokens=16)


def new_stage() -> Any:
    model, objective = SimpleNamespace(preset="tiny", pretrained={}), SimpleNamespace()
    recipe: Any = SimpleNamespace(
        stage="bootstrap", phase="mllm", seed=0, run_dir=Path("."), model=model, objective=objective
    )
    return build(recipe)


@pytest.fixture
def stage():
    built = new_stage()
    with torch.no_grad():  # away from the start, where every word is about as likely
        for parameter in built.model.parameters():
            parameter.mul_(2)
    return built


def batch_of(size=3, length=16 + NUM_TOKENS["questions"]):
    """Prompts about pictures, each with an answer of another length, padded on the right."""
    generator = torch.Generator().manual_seed(0)
    tokens, counts = torch.zeros(size, length, dtype=torch.int64), torch.zeros(size, length, dtype=torch.uint8)
    for row in range(size):
        start = opening().tokens
        end = 30 + 9 * row
        tokens[row, : len(start)] = torch.tensor(start)
        tokens[row, len(start) : end] = torch.randint(3, 59, (end - len(start),), generator=generator)
        counts[row, 25:end:2] = 1
    patches = torch.stack([torch.randint(n, (size, 16), generator=generator) for n in NUM_LABELS], -1).byte()
    pictures = torch.rand(size, 3, 32, 32, generator=generator)
    return {"images": pictures, "tokens": tokens, "counts": counts, "patches": patches}


def terms_of(stage, batch):
    return Program(stage.layers, stage.inputs, list(stage.terms))(batch)[:, 0]


def published(stage):
    """The library's own model with the stage's weights, without the head that is thrown away."""
    own = InternVLForConditionalGeneration(mllm_config(TINY.vision, TINY.language))
    own.set_attn_implementation("eager")
    weights = stage.model.state_dict()
    own.load_state_dict({name: weight for name, weight in weights.items() if not name.startswith("naming_head")})
    return own


def test_words_start_as_far_apart_as_the_preset_says_and_other_weights_as_near(monkeypatch):
    language = new_stage().model.model.language_model
    assert language.embed_tokens.weight.std().item() == pytest.approx(TINY.language.word_range, rel=0.03)
    hidden = language.layers[3].mlp.up_proj.weight
    assert hidden.std().item() == pytest.approx(TINY.language.initializer_range, rel=0.03)
    monkeypatch.setitem(PRESETS, "tiny", resized(TINY, name="tiny", language={"word_range": 0.3}))
    nearer = new_stage().model.model.language_model
    assert nearer.embed_tokens.weight.std().item() == pytest.approx(0.3, rel=0.03)
    assert torch.equal(nearer.layers[3].mlp.up_proj.weight, hidden)


def test_the_layers_equal_the_classs_own_forward_in_loss_and_gradients(stage):
    batch = batch_of()
    terms = terms_of(stage, batch)
    terms.sum().backward()
    own = published(stage)
    logits = own(
        input_ids=batch["tokens"],
        attention_mask=(batch["tokens"] > 0).long(),
        pixel_values=normalise(batch["images"]),
    ).logits
    labels = batch["tokens"].masked_fill(batch["counts"] == 0, -100)
    losses = [F.cross_entropy(one[:-1], label[1:]) for one, label in zip(logits, labels, strict=True)]
    torch.testing.assert_close(terms, torch.stack(losses), rtol=1e-5, atol=1e-6)
    torch.stack(losses).sum().backward()
    compared = 0
    for name, parameter in own.named_parameters():
        assert parameter.grad is not None
        found = stage.model.get_parameter(name).grad
        floor = 1e-7 + 1e-4 * parameter.grad.abs().max().item()  # the keys' biases have no gradient but rounding
        torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=floor)
        compared += 1
    assert compared == len(list(stage.model.parameters())) - len(list(stage.model.naming_head.parameters()))


def test_the_layers_logits_equal_the_classs_own(stage):
    batch = batch_of()
    found = Forward(stage, TINY).run("logits", images=batch["images"], tokens=batch["tokens"])["logits"]
    own = published(stage)
    expected = own(input_ids=batch["tokens"], pixel_values=normalise(batch["images"])).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    ends = torch.tensor([17, 30, 5])
    keep = (torch.arange(batch["tokens"].shape[1]) < ends[:, None]).to(torch.uint8)
    forward = Forward(stage, TINY)
    next_token = forward.next_token(batch["tokens"], keep, forward.features(batch["images"]))
    torch.testing.assert_close(next_token, expected[torch.arange(3), ends - 1], rtol=1e-5, atol=1e-4)


def test_a_samples_loss_depends_on_nothing_but_the_sample(stage):
    batch = batch_of()
    together = terms_of(stage, batch)
    batch["tokens"][1] = 0  # a padded slot: no picture, nothing counts
    batch["counts"][1] = 0
    beside = terms_of(stage, batch)
    alone = terms_of(stage, {name: value[2:] for name, value in batch_of().items()})
    assert beside[1] == 0
    torch.testing.assert_close(beside[[0, 2]], together[[0, 2]], rtol=1e-6, atol=0)
    torch.testing.assert_close(alone, together[2:], rtol=1e-6, atol=0)
    longer = {
        name: F.pad(value, (0, 7)) if name in ("tokens", "counts") else value for name, value in batch_of().items()
    }
    torch.testing.assert_close(terms_of(stage, longer), together, rtol=1e-6, atol=0)


def test_the_picture_and_every_word_before_an_answer_matter(stage):
    batch = batch_of(1)
    before = terms_of(stage, batch)
    changed = {**batch, "images": batch["images"].flip(3)}
    assert not torch.allclose(terms_of(stage, changed), before, rtol=1e-6)
    tokens = batch["tokens"].clone()
    tokens[0, 20] = (tokens[0, 20] - 2) % 56 + 3
    assert not torch.allclose(terms_of(stage, {**batch, "tokens": tokens}), before, rtol=1e-6)


def test_naming_patches_by_hand(stage):
    (naming,) = [layer for layer in stage.layers if isinstance(layer, NamePatches)]
    biases = torch.zeros(sum(NUM_LABELS))
    biases[0] = 1.0  # the first of the shapes: ground
    naming.head.load_state_dict({"weight": torch.zeros(len(biases), 128), "bias": biases})
    features = torch.rand(3, 16, 128)
    patches = torch.full((3, 16, 2), UNKNOWN, dtype=torch.uint8)
    patches[0], patches[1] = torch.tensor([0, 3]), torch.tensor([2, 0])
    (found,) = naming(features, patches).values()
    colors = math.log(NUM_LABELS[1])
    total = math.log(math.e + NUM_LABELS[0] - 1)
    torch.testing.assert_close(found, torch.tensor([total - 1 + colors, total + colors, 0.0]))


def test_next_token_loss_by_hand():
    logits = torch.zeros(2, 3, 2, dtype=torch.bfloat16)
    logits[0, 0, 1] = 1.0
    logits[0, 1, 0] = 2.0
    tokens = torch.tensor([[1, 1, 0], [0, 1, 1]])
    counts = torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.uint8)  # the first token is never predicted
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-2))) / 2
    loss = next_token_loss(logits, tokens, counts)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor([expected, 0.0]))


def test_merge_puts_features_in_order_where_the_picture_stands():
    embedded, features = torch.zeros(2, 4, 1), torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    is_image = torch.tensor([[False, True, True, False], [False] * 4])
    assert merge(embedded, features, is_image)[..., 0].tolist() == [[0, 1, 2, 0], [0, 0, 0, 0]]


def test_rotary_angles_and_mask_by_hand():
    config = Qwen2Config(
        hidden_size=4, num_attention_heads=1, rope_parameters={"rope_type": "default", "rope_theta": 100.0}
    )
    slots = PromptPositions(Rotary(config))(torch.zeros(2, 3, dtype=torch.int64))
    angles = [[p, p / 10, p, p / 10] for p in range(3)]
    for name, function in (("rotary_cos", math.cos), ("rotary_sin", math.sin)):
        expected = torch.tensor([[[function(a) for a in row] for row in angles]] * 2)
        torch.testing.assert_close(slots[name], expected)
    mask = slots["prefix_mask"]
    assert mask.shape == (2, 1, 3, 3)
    assert mask[1, 0].tolist() == [[True, False, False], [True, True, False], [True, True, True]]


def test_greedy_words_are_those_of_the_librarys_generate(stage):
    model = stage.model.eval()
    images, forward = batch_of(1)["images"], Forward(stage, TINY)
    tokens = opening().ask("describe :").tokens
    found = forward.continue_prompt(tokens, forward.features(images), frozenset(), limit=6)
    expected = model.generate(
        input_ids=torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens), dtype=torch.int64),
        pixel_values=normalise(images), do_sample=False, max_new_tokens=6, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert found == expected[0, len(tokens) :].tolist() and len(found) == 6
    assert forward.continue_prompt(tokens, forward.features(images), frozenset(found[:1]), limit=6) == []


def test_the_published_layout_gives_the_next_stages_their_tower_and_the_words(stage, tmp_path):
    stage.export.write(stage, tmp_path, None)
    encoder: Any = TINY.vision.load(PretrainedPart("mllm", tmp_path, "tiny"))
    found = stage.model.model
    for part, own in ((encoder.vision_tower, found.vision_tower), (encoder.projector, found.multi_modal_projector)):
        assert all(torch.equal(value, own.state_dict()[name]) for name, value in part.state_dict().items())
    model = InternVLForConditionalGeneration.from_pretrained(tmp_path, use_safetensors=True)
    batch = batch_of(1)
    given = {"input_ids": batch["tokens"], "pixel_values": normalise(batch["images"])}
    torch.testing.assert_close(model(**given).logits, stage.model(**given).logits, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path)("describe : a cyan circle")["input_ids"] == TEXT.encode(
        "describe : a cyan circle"
    )


def test_an_answer_is_words_about_a_picture_of_any_size(stage):
    stage.model.eval()
    reply = answer(Forward(stage, TINY), Image.new("RGB", (70, 41), "red"), "what color is the circle ?")
    beyond = {f"<{token}>" for token in range(len(TOKENS), TINY.language.vocab_size)}  # a vocabulary is padded
    assert reply and set(reply.split()) <= set(TOKENS) | beyond


QUESTIONS = {
    "What color is the circle?": "what color is the circle ?",
    "how many objects are there": "how many objects are there ?",
    "  is there a RED square ?": "is there a red square ?",
    "a circle, a square": "a circle , a square ?",
}


@pytest.mark.parametrize("typed", QUESTIONS)
def test_a_question_is_read_as_people_type_it(typed):
    assert TEXT.normalize(typed, "question") == QUESTIONS[typed]


def test_an_empty_question_is_refused():
    with pytest.raises(UserError, match=r"^the question is empty"):
        TEXT.normalize("  ", "question")


def write_run(folder, stage="bootstrap", phase="mllm"):
    folder.mkdir()
    (folder / "recipe.yaml").write_text(
        f"stage: {stage}\nphase: {phase}\nmodel: {{preset: tiny}}\nrun_dir: x\nglobal_batch: 4\ntrain: {{steps: 1}}\n"
        "optimizer: {lr: 1.0e-3}\ndata: {task_block: 4, sources: [{name: captions, shards: x}]}\n"
        "checkpoint: {every: 1}\n"
    )
    Image.new("RGB", (40, 50), "red").save(folder / "picture.png")
    return folder


def test_what_cannot_be_asked_is_refused_before_anything_is_loaded(tmp_path):
    other = write_run(tmp_path / "other", phase="autoencoder")
    with pytest.raises(UserError, match=r"'autoencoder', which answers no questions; .* phase 'mllm', or .* is needed"):
        ask(other, other / "picture.png", "what color is the circle?")
    run = write_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"unknown words: 'colour'; did you mean 'color'\?"):
        ask(run, run / "picture.png", "what colour is the circle?")
    with pytest.raises(UserError, match=r"holds no recipe\.yaml"):
        ask(tmp_path, run / "picture.png", "what color is the circle?")
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        ask(run, run / "picture.png", "what color is the circle?")


def test_within_spar_the_language_model_answers_as_the_librarys_generate(tmp_path):
    """The prompt shows features of the tokenizer's vision tower."""
    values = phase_values(tmp_path / "run", "align/joint", tmp_path, make_parts(tmp_path))
    stage = build(Recipe.model_validate_json(json.dumps(values)))
    spar: Any = stage.model.eval()
    with torch.no_grad():
        for parameter in spar.language_model.parameters():
            parameter.mul_(2)
    whole: Any = InternVLForConditionalGeneration(mllm_config(TINY.vision, TINY.language)).eval()
    whole.model.language_model.load_state_dict(spar.language_model.state_dict())
    whole.lm_head.load_state_dict(spar.lm_head.state_dict())
    whole.model.vision_tower.load_state_dict(spar.tokenizer.vision_tower.state_dict())
    whole.model.multi_modal_projector.load_state_dict(spar.tokenizer.projector.state_dict())
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    tokens = torch.tensor([opening().ask("question : how many objects are there ? answer :").tokens])
    expected = whole.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=16,
        pixel_values=normalise(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255),
        eos_token_id=[TOKENS["."], TOKENS["<eos>"]], pad_token_id=0,
    )[0, tokens.shape[1] :].tolist()  # fmt: skip
    words = TEXT.decode([token for token in expected if token not in (TOKENS["."], TOKENS["<eos>"])])
    assert answer(Forward(stage, TINY), Image.fromarray(pixels), "how many objects are there ?") == words
    assert words
