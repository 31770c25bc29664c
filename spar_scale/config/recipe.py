"""The schema of a recipe, which defines a training run completely.

Every key is declared here with its unit and range. An unknown key, a value of another type, and contradictory keys are
refused before anything is built (see `spar_scale.config.settings`). There is no key for dropout, because with dropout a
run would depend on the layout. Keys under `parallel` define the layout and do not change what is computed.

This module has no slow imports, so that a command can refuse a recipe within a second.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator

from parallel.errors import UserError, nearest
from parallel.files import write_file
from parallel.optimizers import OPTIMIZERS
from spar_scale.config.core_yaml import dump
from spar_scale.config.rules import RULES
from spar_scale.config.settings import CONTRADICTIONS_FOLLOW, Contradiction, Lookup, load, show
from spar_scale.phases import find, phase_names, phases_by_stage, readers

RESUME_MAY_CHANGE = (
    "parallel",
    "data.workers",
    "data.encoded",
    "data.plan_tokens",
    "checkpoint",
    "tracking",
    "train.log_every",
    "guards",
    "attention",
)
"""Keys (with all keys below them) that may change when a run is resumed."""

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


def _text(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError("must be a text of one or more characters, none of them NUL")
    return text


def _expanded(path: str) -> str:
    """Replace `~` or `~user` at the start by the home directory."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise ValueError(f"must be a path, and this machine has no user {user[1:]} (a name with ~ is written ./~)")
    return expanded


def _own_directory(path: Path) -> Path:
    if os.path.basename(os.path.normpath(path)) in ("", ".", ".."):
        raise ValueError("must end in the name of the run's own directory, as in runs/NAME")
    return Path(_expanded(_text(str(path))))


def _caption_member(name: str) -> str:
    member, colon, key = name.partition(":")
    if not member or member != member.lower() or (colon and not key):
        raise ValueError(
            "must be the extension of a member in lower case (txt), or with a key of its object (json:KEY)"
        )
    return name


Text = Annotated[str, AfterValidator(_text)]
CaptionMember = Annotated[str, AfterValidator(_text), AfterValidator(_caption_member)]
CaptionMembers = Annotated[
    list[CaptionMember],
    BeforeValidator(lambda given: [given] if isinstance(given, str) else given),
    Field(min_length=1),
]
PathText = Annotated[str, AfterValidator(_text), AfterValidator(_expanded)]


class Section(BaseModel):
    """One mapping of a recipe; unknown keys, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The shapes, the pretrained parts, and the switches of the ablations."""

    preset: Text
    """Named shapes, e.g. `tiny`."""
    image_size: Count | None = None
    """Side of the pictures in pixels, to which the vision tower's positions are interpolated; null is the preset's."""
    pretrained: dict[str, PathText] = {}
    """Part name -> directory of its published layout, relative to the run directory."""
    routing: Literal["dynamic", "last_layer", "uniform"] = "dynamic"
    """How the hidden states of the language model's layers are mixed."""
    alignment: Literal["self", "none", "external"] = "self"
    """The teacher of the diffusion transformer's features."""
    streams: Literal["dual", "semantic", "pixel"] = "dual"
    """The streams of the unified tokenizer."""
    encoder: Literal["trained", "frozen"] = "trained"
    """`frozen`: the vision encoder is not trained in the phases that otherwise train it."""
    semantic_distillation: bool = True
    """L_s: keep the encoder's features close to its initial ones."""
    pixel_alignment: bool = True
    """L_p: keep the pixel stream close to the frozen pixel encoder's latent."""


def _known_optimizer(name: str) -> str:
    if name not in OPTIMIZERS:
        raise ValueError(f"must be {', '.join(map(repr, OPTIMIZERS))}{nearest(name, OPTIMIZERS)}")
    return name


def _known_stage(name: str) -> str:
    stages = phases_by_stage()
    if name not in stages:
        raise ValueError(f"must be {', '.join(map(repr, stages))}{nearest(name, stages)}")
    return name


class TrainConfig(Section):
    """How long the run is."""

    steps: Count
    """Optimizer steps of the run; the learning-rate schedule ends there."""
    log_every: Count = 10
    """Steps between two writes of the metrics (the values of every step are written)."""


class OptimizerConfig(Section):
    """The update rule, its schedule and the exponential moving average (EMA) of the weights."""

    name: Annotated[str, AfterValidator(_known_optimizer)] = "adamw"
    """`adamw` (torch's, fused), `nadam`, `radam`, `muon` (DeepSpeed's, with AdamW for parameters that are not hidden
    matrices), `apex_adam` or `deepspeed_adam`."""
    lr: Positive
    """Peak learning rate of AdamW."""
    min_lr: NotNegative = 0.0
    """Learning rate at the last step."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up from 0 to `lr`."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """Decay from `lr` to `min_lr` after the warm-up (`constant` stays at `lr`)."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    eps: Positive = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay."""
    clip: NotNegative = 1.0
    """Gradient norm above which gradients are clipped; 0 disables clipping."""
    groups: dict[str, NotNegative] = {}
    """Learning-rate multiplier by parameter group of the training stage, e.g. `{encoder: 0.1}`; 1 for other groups."""
    ema_decay: BelowOne = 0.999
    """Decay of the EMA of the weights, from which the next phase starts."""
    muon_lr: Positive = 0.015
    """Peak learning rate of Muon's matrices; follows the same schedule as `lr`."""
    muon_momentum: BelowOne = 0.95
    """Momentum of Muon."""


class ObjectiveConfig(Section):
    """Weights and settings of the losses; each is read by the phases that have such a loss."""

    perceptual: Literal["gradient_difference", "lpips", "lpips_convnext"] = "gradient_difference"
    """The perceptual loss: the difference of image gradients, which needs no network; LPIPS on VGG16; or that with 0.1
    times the distance of ConvNeXt-S's logits, as published. The last two need `model.pretrained.perceptual`."""
    perceptual_weight: NotNegative = 0.0
    """Coefficient of the perceptual loss beside the mean squared error."""
    pixel_alignment_weight: NotNegative = 1.0
    """lambda_p, the coefficient of L_p."""
    semantic_distillation_weight: NotNegative = 1.0
    """lambda_s, the coefficient of L_s (in the phase that trains the encoder)."""
    adversarial_weight: NotNegative = 0.0
    """lambda_GAN, the coefficient of the generator's loss; 0 trains without a discriminator."""
    adversarial_start: Annotated[int, Field(ge=0)] = 0
    """Last step without the discriminator."""
    lecam_weight: NotNegative = 0.001
    """Coefficient of the LeCam regulariser in the discriminator's loss."""
    latent_noise: NotNegative = 0.0
    """Standard deviation of the noise that is added to the pixel decoder's input latent during training."""
    latent_power_weight: NotNegative = 0.0
    """Coefficient of the penalty on a mean square of the latent above 1, which prevents growth."""
    align_weight: NotNegative = 0.5
    """lambda_a, the coefficient of the alignment of the diffusion transformer."""
    align_block: Count = 6
    """Block of the diffusion transformer whose features are aligned, counted from 1."""
    timestep_shift: Annotated[float, Field(ge=1)] = 1.0
    """Shift s of the training times towards noise, sigma -> s sigma / (1 + (s - 1) sigma); the paper has 1."""
    caption_dropout: Share = 0.1
    """Share of samples trained without their caption."""


class DiscriminatorConfig(Section):
    """The discriminator's own AdamW and schedule, counted from `objective.adversarial_start`."""

    lr: Positive | None = None
    """Peak learning rate; null follows the rate of `optimizer`, times `optimizer.groups.discriminator`."""
    min_lr: NotNegative = 0.0
    """Learning rate at the last step."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up from 0 to `lr`, from the discriminator's first step on."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """Decay from `lr` to `min_lr` after the warm-up (`constant` stays at `lr`)."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay of its matrices and convolutions."""


class SourceConfig(Section):
    """One set of shards."""

    name: Text
    """Name of the source, from which its shuffle follows; no two sources share one."""
    shards: PathText
    """Glob or URL of webdataset tar shards."""
    weight: Positive = 1.0
    """Share of this source, relative to the other sources."""
    task: Text | None = None
    """The task of these samples in a phase that has several (`generation`, `editing`); null takes the source's name.
    Several sources may have the same task."""
    text: CaptionMembers | None = None
    """Member with the caption or instruction: an extension (`txt`), or a key of a JSON object (`json:caption_long`). Of
    several, in a list here or in the JSON, one is drawn for each sample. null: generation reads `captions` of the json,
    else the txt, else `caption` of the json; editing reads the txt."""
    fit: Literal["crop", "stretch"] = "crop"
    """How a picture becomes square: `crop` takes its largest square, `stretch` resizes the whole picture."""


class DataConfig(Section):
    """The training data, and how it is divided."""

    sources: Annotated[list[SourceConfig], Field(min_length=1)]
    """The sources of the mixture."""
    task_block: Count
    """Consecutive samples of a global batch that share one task."""
    workers: Annotated[int, Field(ge=0)] = 1
    """Loader worker processes per rank; 0 loads in the training process."""
    plan_tokens: Count | None = None
    """Mean tokens of a prompt without its picture, by which a pipeline is cut and `spar-scale plan` counts; null takes
    the longest prompt that is read."""
    long_captions: Literal["cut", "refuse"] = "cut"
    """What becomes of a caption or instruction whose prompt exceeds the phase's maximum: `cut` leaves out its end (as
    the paper's scripts do), `refuse` makes it a bad sample."""
    encoded: PathText | None = None
    """Directory of the stored values of `spar-scale data encode`, relative to the run directory; null computes them."""


class CheckpointConfig(Section):
    """When the run is saved."""

    every: Count
    """Steps between two checkpoints; the last step always has one."""
    keep: Count = 3
    """Retention: how many checkpoints are kept; the oldest are removed first."""


class GuardsConfig(Section):
    """Limits at which a faulty run stops."""

    max_skipped_steps: Annotated[int, Field(ge=0)] = 10
    """Consecutive steps with a non-finite loss or gradient that are skipped before the run stops."""
    max_bad_fraction: Share = 0.01
    """Accepted share of bad samples among the latest 1000; of the first 100, this share of 100."""
    timeout_s: Annotated[float, Field(ge=5)] = 600
    """Seconds that a rank may wait for another rank or a batch, or send no heartbeat, before the run ends and names it.
    It must exceed the time by which ranks can differ, such as that of a slow disk of one node."""


class TrackingConfig(Section):
    """The MLflow mirror of metrics.jsonl."""

    mirror: bool = True
    """Whether the run is mirrored to MLflow."""
    uri: Text | None = None
    """Address of the MLflow server; null uses a database file in the parent of the run directory."""
    experiment: Text = "spar"
    """Name of the MLflow experiment, common to the runs of a study."""


class ParallelConfig(Section):
    """The layout. The data-parallel size is the world size divided by the tensor- and pipeline-parallel sizes."""

    tensor: Count = 1
    """Tensor-parallel size: ranks that share each matrix."""
    pipeline: Count = 1
    """Pipeline-parallel size: ranks that share the list of layers."""
    zero: Literal[1, 2, 3] = 1
    """ZeRO stage: data-parallel ranks share 1 the optimizer state, 2 also gradients, 3 also weights."""
    micro_batch: Count = 16
    """Samples that one rank computes at a time."""
    recompute: Literal["none", "blocks"] = "none"
    """`blocks` saves only the inputs of each layer for the backward pass and recomputes its activations."""


class Recipe(Section):
    """One training run."""

    stage: Annotated[str, AfterValidator(_known_stage)]
    """The training stage: the part of SPAR that trains."""
    phase: str
    """The phase of the training stage."""
    model: ModelConfig
    init_from: PathText | None = None
    """Run directory of the previous phase, relative to `run_dir`; this run starts from its EMA weights."""
    run_dir: Annotated[Path, AfterValidator(_own_directory)]
    """Directory for everything that this run writes, relative to the working directory."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """The seed of initial weights, data order and all random draws."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16`: weights and activations in bf16, master weights, sums and losses in fp32."""
    attention: Literal["auto", "math", "sdpa", "flash", "flash_attn_2", "flash_attn_3", "flash_attn_4"] = "auto"
    """Backend of softmax attention; a backend that is not available is refused (`spar-scale doctor` lists them)."""
    global_batch: Count
    """Samples per optimizer step, over all ranks."""
    train: TrainConfig
    optimizer: OptimizerConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    data: DataConfig
    checkpoint: CheckpointConfig
    guards: GuardsConfig = GuardsConfig()
    tracking: TrackingConfig = TrackingConfig()
    parallel: ParallelConfig = ParallelConfig()

    @classmethod
    def contradictions(cls, value: Lookup) -> Iterator[Contradiction]:
        """Yield (dotted key, found value and rule) for contradictory keys."""
        for rule in (*RULES, _read_by_this_stage, _has_parts_that_it_asks_for):
            with contextlib.suppress(KeyError):  # a key of this rule is invalid itself, which is reported already
                yield from rule(value)

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> Recipe:
        if info.context == CONTRADICTIONS_FOLLOW:
            return self
        values = dict(flatten(self.model_dump()))
        broken = [f"{key}: {rule}" for key, rule in Recipe.contradictions(values.__getitem__)]
        if broken:
            raise ValueError("; ".join(broken))
        return self

    def save(self, path: Path) -> None:
        """Write every key with its value to `path`, atomically."""
        write_file(path, dump(self.model_dump(mode="json")))


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe with its parents, apply `a.b=c` overrides and validate. Raises UserError that lists all errors."""
    return load(path, Recipe, overrides)


def load_folder(folder: Path, overrides: list[str] | None = None) -> dict[str, Recipe]:
    """Return phase -> recipe of a folder with one file for each phase, in the order in which they can be trained.

    In the overrides, `run_dir` is the directory of the runs, one for each phase. Raises UserError as `load_recipe`, and
    for a folder without recipes.
    """
    files = {phase: folder / f"{phase}.yaml" for phase in phase_names() if (folder / f"{phase}.yaml").is_file()}
    if not files:
        raise UserError(f"{folder}: holds no recipe of a phase ({', '.join(phase_names())}, each with .yaml)")
    return {
        phase: load_recipe(
            path, [f"{word}/{phase}" if word.startswith("run_dir=") else word for word in overrides or []]
        )
        for phase, path in files.items()
    }


def beside(run_dir: Path, reference: str) -> Path:
    """Return the absolute path of a reference that a recipe gives relative to its run directory.

    `..` is resolved in the text of the path: `../init` for the run directory `runs/a` is `runs/init`, even if `runs/a`
    is a symbolic link to another disk.
    """
    return Path(os.path.abspath(run_dir / reference))


def behind_link(run_dir: Path, reference: str) -> str:
    """Return a hint for an error message if the path only exists relative to the target of a symbolic link."""
    behind = Path(os.path.realpath(run_dir / reference))
    if beside(run_dir, reference).exists() or not behind.exists():
        return ""
    return f"; {run_dir} is a symbolic link, and {behind} exists at its target: give that absolute path to use it"


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Return the dotted keys whose values differ, sorted."""
    before, after = (dict(flatten(recipe.model_dump(mode="json"))) for recipe in (old, new))
    absent = object()
    return sorted(key for key in before.keys() | after.keys() if before.get(key, absent) != after.get(key, absent))


def may_change_at_resume(key: str) -> bool:
    """Return whether a run may be resumed with another value of this dotted key (RESUME_MAY_CHANGE)."""
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in RESUME_MAY_CHANGE)


def flatten(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of nested mappings; a list counts as one value."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _read_by_this_stage(value: Lookup) -> Iterator[Contradiction]:
    stage, phase = value("stage"), value("phase")
    declared = find(stage, phase)
    if declared is None:  # reported by another rule
        return
    for key, those in readers().items():
        with contextlib.suppress(KeyError):
            if key not in declared.optional_keys and value(key) != _default(key):
                only = f"only {' and '.join(those)} would"
                some = any(reader.startswith(f"{stage}/") for reader in those)
                reader = f"{stage}/{phase}" if some else f"stage {stage}"
                yield key, f"found {show(value(key))}, but {reader} does not read it ({only})"


def _has_parts_that_it_asks_for(value: Lookup) -> Iterator[Contradiction]:
    declared, given = find(value("stage"), value("phase")), value("model.pretrained")
    for part, (key, *kinds) in ({} if declared is None else declared.requires_when).items():
        if value(key) in kinds and part not in given:
            need = f"{key} {show(value(key))} needs it; name its directory, relative to run_dir"
            yield f"model.pretrained.{part}", f"missing, but {need}"


def _default(key: str) -> Any:
    section, _, name = key.rpartition(".")
    holder: Any = Recipe.model_fields[section].annotation if section else Recipe
    return holder.model_fields[name].default
