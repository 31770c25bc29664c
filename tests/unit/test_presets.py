"""The presets: parts of the published sizes, built on the meta device, and shapes that refuse to disagree.

Every count is worked out here from the shapes, as the papers and the published classes describe the
parts; published totals and `about` are a second, independent check.
"""

import json
from dataclasses import replace
from operator import attrgetter
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from parallel.errors import UserError
from parallel.program import Layer, Subprogram
from spar_scale.models.initialise import initialise
from spar_scale.models.internvl.language import Rotary
from spar_scale.models.internvl.model import build_mllm, mllm_config
from spar_scale.models.presets import PRESETS, Preset, resized
from spar_scale.models.published import PretrainedPart
from spar_scale.models.spar.model import SPAR

LARGE = ("spar_1b", "spar_3b")
QWEN_VOCABULARY = 151936  # of Qwen2.5; InternVL3 cut it to its 151674 words
QWEN_PARAMETERS = {"spar_1b": 494_032_768, "spar_3b": 1_543_714_304}  # Qwen2.5-0.5B and 1.5B, whose head is tied
PUBLISHED = {  # parameters of published models, and how far the count may lie from them
    ("spar_1b", "mllm"): (938_193_024, 0),  # InternVL2.5-1B, of the same shapes as 3-1B
    ("spar_3b", "mllm"): (2_088_957_440, 0),  # InternVL3-2B
    ("spar_1b", "autoencoder"): (312_250_275, 0),  # DC-AE of SANA
    ("spar_3b", "autoencoder"): (312_250_275, 0),
    ("spar_1b", "diffusion"): (590e6, 0.005),  # SANA 0.6B
    ("spar_3b", "diffusion"): (1604e6, 0.005),  # SANA 1.6B
    ("spar_1b", "pixel_layers"): (57.8e6, 0.02),  # from here on: estimates made before these parts were built
    ("spar_3b", "pixel_layers"): (170e6, 0.02),
    ("spar_1b", "residual_blocks"): (9.6e6, 0.02),
    ("spar_3b", "residual_blocks"): (28e6, 0.02),
    ("spar_1b", "vision"): (304e6, 0.02),
    ("spar_3b", "vision"): (304e6, 0.02),
    ("spar_1b", "routing"): (1.21e6, 0.02),
    ("spar_1b", "connector"): (90e6, 0.02),
}


@pytest.fixture(scope="module", params=LARGE)
def preset(request):
    return PRESETS[request.param]


@pytest.fixture(scope="module")
def parts(preset) -> dict[str, Any]:
    """Every part of the preset, on the meta device."""
    language, diffusion = preset.language, preset.diffusion
    with torch.device("meta"):
        mllm = build_mllm(preset.vision, language)
        tokenizer = preset.tokenizer.build(preset.vision, preset.autoencoder, pixel_encoder=True, initial_encoder=True)
        transformer = diffusion.build()
        spar = SPAR(preset.conditioning, language, diffusion, mllm, tokenizer, transformer, aligned=True)
        return {
            "spar": spar,
            "mllm": mllm,
            "vision": mllm.model.vision_tower,
            "projector": mllm.model.multi_modal_projector,
            "language": mllm.model.language_model,
            "head": mllm.lm_head,
            "tokenizer": tokenizer,
            "pixel_layers": tokenizer.pixel_stream.layers,
            "residual_blocks": torch.nn.ModuleList([tokenizer.semantic_stream.blocks, tokenizer.pixel_stream.blocks]),
            "latent_heads": torch.nn.ModuleList([tokenizer.semantic_stream.head, tokenizer.pixel_stream.head]),
            "fusion": tokenizer.fusion,
            "autoencoder": preset.autoencoder.build(),
            "queries": spar.queries,
            "routing": spar.routing,
            "connector": spar.connector,
            "diffusion": transformer,
            "alignment_head": spar.alignment_head,
        }


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def linear(inputs, outputs):
    return inputs * outputs + outputs


def decoder_layer(preset):
    """Qwen2: biases on queries, keys and values alone; three matrices of the SwiGLU; two RMS norms."""
    width, shape = preset.language.width, preset.language
    key_value = width // shape.heads * shape.key_value_heads
    attention = linear(width, width) + 2 * linear(width, key_value) + width * width
    return attention + 3 * width * shape.mlp_width + 2 * width


def expected(preset):
    """Parameters of each part but the autoencoder, from the shapes."""
    vision, language, diffusion = preset.vision, preset.language, preset.diffusion
    width, channels, image = preset.language.width, preset.autoencoder.latent_channels, vision.width
    patches = (vision.image_size // vision.patch_size) ** 2
    block = 4 * image + 4 * linear(image, image) + linear(image, vision.mlp_width) + linear(vision.mlp_width, image)
    folded = image * 4  # 2 x 2 patches
    counts = {
        "vision": image + (patches + 1) * image + linear(3 * vision.patch_size**2, image)
        + vision.layers * (block + 2 * image),  # the two layer scales
        "projector": 2 * folded + linear(folded, width) + linear(width, width),
        "language": language.vocab_size * width + language.layers * decoder_layer(preset) + width,
        "head": language.vocab_size * width,
        "pixel_layers": 6
        * (4 * width + 4 * linear(width, width) + linear(width, 4 * width) + linear(4 * width, width)),
        "residual_blocks": 6 * (2 * width + 2 * linear(width, width)),
        "latent_heads": 2 * (2 * width + linear(width, channels) + linear(channels, channels)),
        "fusion": 2 * 64 + linear(64, 64) + linear(64, 32),
        "queries": 256 * width,
        "routing": linear(width, width // 2) + linear(width // 2, 4) + 4 + 2 * width + linear(width, width),
        "connector": 6 * decoder_layer(preset) + width + linear(width, 2304),
        "alignment_head": linear(diffusion.width, 2048) + linear(2048, 2048) + linear(2048, width),
    }  # fmt: skip
    counts["mllm"] = sum(counts[part] for part in ("vision", "projector", "language", "head"))
    wide, hidden = diffusion.width, int(2.5 * diffusion.width)
    mix = linear(wide, 2 * hidden) + (9 + 1) * 2 * hidden + hidden * wide  # 1x1, depthwise 3x3, 1x1 without bias
    sana = 6 * wide + 3 * wide * wide + linear(wide, wide) + 4 * linear(wide, wide) + mix
    time = linear(256, wide) + linear(wide, wide) + linear(wide, 6 * wide)
    captions = linear(2304, wide) + linear(wide, wide) + wide
    counts["diffusion"] = linear(32, wide) + time + captions + diffusion.layers * sana + 2 * wide + linear(wide, 32)
    return counts


def test_every_part_has_as_many_parameters_as_its_shapes_say(preset, parts):
    found = {part: count(module) for part, module in parts.items()}
    wanted = expected(preset)
    assert {part: found[part] for part in wanted} == wanted


def test_the_tokenizer_holds_its_parts_and_two_teachers_once(parts):
    encoder = count(parts["vision"]) + count(parts["projector"])
    streams = sum(count(parts[part]) for part in ("pixel_layers", "residual_blocks", "latent_heads", "fusion"))
    assert count(parts["tokenizer"]) == 2 * encoder + streams + count(parts["autoencoder"])


def test_counts_agree_with_published_ones(preset, parts):
    known = {part: PUBLISHED[name, part] for name, part in PUBLISHED if name == preset.name}
    far = {
        part: (count(parts[part]), published)
        for part, (published, tolerance) in known.items()
        if abs(count(parts[part]) - published) > tolerance * published
    }
    assert not far and len(known) >= 6
    assert len(parts["autoencoder"].state_dict()) == 375  # tensors of the published file


def test_the_language_model_is_qwens_with_fewer_words(preset, parts):
    missing = (QWEN_VOCABULARY - preset.language.vocab_size) * preset.language.width
    assert count(parts["language"]) == QWEN_PARAMETERS[preset.name] - missing
    assert parts["head"].weight is not parts["language"].embed_tokens.weight


def test_nothing_is_allocated(parts):
    for module in parts.values():
        assert {tensor.device.type for tensor in (*module.parameters(), *module.buffers())} == {"meta"}


def shapes_of(layers: list[Layer], *wanted: str, **slots: Tensor) -> tuple[tuple[int, ...], ...]:
    """Run layers on the meta device; return the shapes of the wanted slots."""
    found = Subprogram(layers, wanted)({name: slot.to("meta") for name, slot in slots.items()})
    return tuple(tuple(found[name].shape) for name in wanted)


def test_the_parts_read_what_the_parts_before_them_write(preset, parts):
    """448 pixels to 16 x 16 latents, decoded at 512 pixels and resized; captions of two prompts read by 256 tokens."""
    tokenizer, spar, width = parts["tokenizer"], parts["spar"], preset.language.width
    latent = (1, *preset.latent_shape)
    assert latent == (1, 32, 16, 16)
    seen = [*preset.vision.feature_layers(tokenizer, frozen=True), *preset.tokenizer.latent_layers(tokenizer)]
    images, latents = torch.rand(1, 3, 448, 448), torch.rand(latent)
    assert shapes_of(seen, "features", "tokenizer_latent", images=images) == ((1, 256, width), latent)
    assert parts["autoencoder"].decoder(latents.to("meta")).shape == (1, 3, 512, 512)
    drawn = preset.autoencoder.reconstruction_layers(tokenizer.decoder, preset.image_size)
    assert shapes_of(drawn, "reconstruction", decoder_input=latents) == ((1, 3, 448, 448),)
    longest = preset.longest_sequence
    conditioned = preset.conditioning.conditioning_layers(spar, preset.language, illustrated=False, longest=longest)
    tokens, lengths = torch.ones(2 * 160, dtype=torch.int64), torch.tensor([160, 160])
    captions, routed, bounds = shapes_of(
        conditioned, "captions", "routing_weights", "caption_bounds", tokens=tokens, lengths=lengths
    )
    assert captions == (2 * (160 + 256), 2304) and routed == (2 * (160 + 256), 4) and bounds == (3,)
    velocity = preset.diffusion.velocity_layers(parts["diffusion"], longest)
    predicted, tapped = shapes_of(
        velocity, "velocity", "image_tokens", noisy_latent=torch.rand(2, *latent[1:]), timestep=torch.rand(2),
        captions=torch.rand(captions), caption_bounds=torch.zeros(bounds, dtype=torch.int64),
    )  # fmt: skip
    assert predicted == (2, *latent[1:])
    aligned = parts["alignment_head"](torch.rand(tapped, device="meta"))
    assert aligned.shape == (2, preset.vision.tokens, width)


def test_what_the_counts_cannot_see_is_as_published(preset):
    """Head counts, spellings and scales of the published config.json files, which a loader compares."""
    config = preset.autoencoder.config()
    assert (config["downsample_block_type"], config["upsample_block_type"]) == ("Conv", "interpolate")
    assert (config["attention_head_dim"], config["scaling_factor"]) == (32, 0.41407)
    model = mllm_config(preset.vision, preset.language)
    assert isinstance(model.text_config, Qwen2Config)
    assert (model.image_token_id, model.image_seq_length, model.tie_word_embeddings) == (151667, 256, False)
    heads = (model.text_config.num_attention_heads, model.text_config.num_key_value_heads)
    assert heads == {"spar_1b": (14, 2), "spar_3b": (12, 2)}[preset.name]
    sana = preset.diffusion.config()
    assert (sana["num_attention_heads"], sana["num_cross_attention_heads"]) == {
        "spar_1b": (36, 16),
        "spar_3b": (70, 20),
    }[preset.name]
    assert (sana["attention_head_dim"], sana["sample_size"], sana["interpolation_scale"]) == (32, 16, None)


def test_the_published_rotary_scaling_changes_nothing_below_its_limit():
    """The config as InternVL3 publishes it; transformers' class at the same positions, bit for bit."""
    scaling: Any = {"rope_theta": 1e6, "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}}
    published = Qwen2Config(hidden_size=128, num_attention_heads=2, max_position_embeddings=2048, **scaling)
    sizes = {"heads": 2, "max_positions": 2048, "rope_theta": 1e6, "rope_factor": 2.0}
    preset: Any = resized(PRESETS["tiny"], name="scaled", language=sizes)
    ours = mllm_config(preset.vision, preset.language).text_config
    for config in (published, ours):
        assert isinstance(config, Qwen2Config)
        assert dict(config.rope_parameters or {}).items() >= {"rope_type": "dynamic", "factor": 2.0}.items()
        hidden, whole = torch.zeros(1), torch.arange(2049)[None]
        rotary, scaled = Rotary(config), Qwen2RotaryEmbedding(config)
        for mine, its in zip(rotary(whole[:, :2048]), scaled(hidden, whole[:, :2048]), strict=True):
            assert torch.equal(mine, its)
        assert not torch.equal(rotary(whole)[0], scaled(hidden, whole)[0])  # one position more


def test_a_directory_as_internvl_publishes_it_loads(tmp_path):
    """The published config.json has `rope_scaling` and no word on tied embeddings; its head is its own matrix."""
    preset: Any = resized(PRESETS["tiny"], name="tiny", language={"rope_factor": 2.0})
    model = build_mllm(preset.vision, preset.language)
    initialise(model, seed=0)
    model.save_pretrained(str(tmp_path))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert {name.split(".")[0] for name in names} == {"vision_tower", "multi_modal_projector", "language_model"}
    assert {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"} <= names
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"]
    del config["text_config"]["rope_parameters"]
    scaling = {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}
    config["text_config"] |= {"rope_theta": 1e4, "rope_scaling": scaling}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded: Any = preset.language.load(PretrainedPart("mllm", tmp_path, "tiny"), preset.vision)
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert loaded.model.language_model.config.rope_parameters["rope_type"] == "dynamic"


def test_another_rotary_scaling_is_refused():
    config = Qwen2Config(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(ValueError, match="rotary positions of type linear: default or dynamic"):
        Rotary(config)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("image_size", 224, "vision.picture_size = 448 must equal image_size = 224"),
        ("vision.image_size", 512, "vision.picture_size = 512 must equal image_size = 448"),
        ("vision.patch_size", 15, "vision.pixels_per_token = 30.0 must divide vision.picture_size = 448"),
        ("vision.heads", 15, "vision.heads = 15 must divide vision.width = 1024"),
        ("vision.output_width", 1536, "vision.output_width = 1536 must equal language.width = 896"),
        ("tokenizer.pixel_heads", 15, "tokenizer.pixel_heads = 15 must divide vision.output_width = 896"),
        ("tokenizer.pixel_heads", 0, "tokenizer.pixel_heads = 0 must divide vision.output_width = 896"),
        ("language.heads", 12, "language.heads = 12 must divide language.width = 896"),
        ("language.key_value_heads", 4, "language.key_value_heads = 4 must divide language.heads = 14"),
        ("language.image_token_id", 151674, "language.image_token_id = 151674 must be below language.vocab_size"),
        ("language.max_positions", 1281, "longest_sequence = 1282 must be at most language.max_positions = 1281"),
        ("conditioning.num_queries", 64, "conditioning.num_queries = 64 must equal latent_positions = 256"),
        ("conditioning.sampled_states", 25, "conditioning.sampled_states = 25 must be at most language.layers = 24"),
        ("conditioning.connector_layers", 25, "conditioning.connector_layers = 25 must be at most language.layers"),
        ("autoencoder.latent_channels", 16, "diffusion.latent_channels = 32 must equal autoencoder.latent_channels"),
        ("diffusion.sample_size", 32, "diffusion.sample_size = 32 must equal vision.grid = 16"),
        ("diffusion.patch_size", 3, "diffusion.patch_size = 3 must divide diffusion.sample_size = 16"),
        ("diffusion.cross_heads", 20, "diffusion.cross_width = 1440 must equal diffusion.width = 1152"),
    ],
)
def test_shapes_that_cannot_work_together_are_refused(field, value, said):
    preset, (part, _, name) = PRESETS["spar_1b"], field.rpartition(".")
    changed = {part: replace(attrgetter(part)(preset), **{name: value})} if part else {name: value}
    with pytest.raises(ValueError) as refusal:
        replace(preset, **changed)
    assert str(refusal.value).startswith(f"preset 'spar_1b': {said}")


def test_a_role_that_is_absent_is_named_where_it_is_used_and_breaks_no_rule():
    """A preset of a vision encoder and a tokenizer alone; rules between roles that are there still hold."""
    tiny: Any = PRESETS["tiny"]
    preset = Preset(name="half", image_size=32, vision=tiny.vision, tokenizer=tiny.tokenizer)
    assert set(preset.members) == {"vision", "tokenizer"}
    with pytest.raises(UserError, match=r"^model\.preset: 'half' has no language, which this phase or command needs$"):
        _ = preset.language.width
    assert resized(preset, name="other", vision={"layers": 2}).vision == replace(tiny.vision, layers=2)
    with pytest.raises(ValueError, match=r"preset 'half': tokenizer\.pixel_heads = 3 must divide vision\.output_width"):
        replace(preset, tokenizer=replace(tiny.tokenizer, pixel_heads=3))
