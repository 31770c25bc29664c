"""Bodies of the commands that use a trained run. Each checks what it is given before it loads anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from parallel.errors import UserError
from spar_scale.config.recipe import Recipe
from spar_scale.files.outputs import check_picture, write_picture
from spar_scale.inference import drawing
from spar_scale.inference.pictures import image_psnr, middle_square, open_image, sheet, to_image
from spar_scale.inference.pipeline import reconstruct_image
from spar_scale.inference.routes import route, routes_picture, routes_table
from spar_scale.inference.runs import TrainedRun, check_length, fit_recipe, load_run, text_of_run
from spar_scale.inference.sampler import seeded_noise
from spar_scale.models.presets import Preset
from spar_scale.models.spar import SamplingShape
from spar_scale.objectives.flow_matching import NUM_TIMESTEPS
from spar_scale.phases import Command
from spar_scale.stages.forward import Forward
from spar_scale.stages.parts import preset_of


@dataclass(frozen=True)
class SamplingOptions:
    """How to draw: pictures of the seeds seed, seed + 1, ...; None stands for the preset's own value."""

    seed: int = 0
    number: int = 1
    steps: int | None = None
    guidance: float | None = None

    def sampling(self, preset: Preset) -> SamplingShape:
        """The preset's way of sampling with the options laid over it. UserError for more steps than there are."""
        wanted = {"steps": self.steps, "guidance": self.guidance}
        sampling = replace(preset.sampling, **{name: value for name, value in wanted.items() if value is not None})
        if sampling.steps > NUM_TIMESTEPS:
            raise UserError(f"--steps: found {sampling.steps}; the flow has {NUM_TIMESTEPS}")
        return sampling


def generate(run_dir: Path, prompt: str, out: Path, options: SamplingOptions) -> str:
    """Draw a prompt, write the picture, return what was done."""
    words, _ = _prompt(fit_recipe(run_dir, "generate"), prompt)
    check_picture(out)

    def pictures(model: Forward, noise: Tensor, sampling: SamplingShape) -> Tensor:
        return drawing.generate(model, [words] * options.number, noise, sampling)

    return _drawn(run_dir, "generate", pictures, f"draw : {words}", out, options)


def edit(run_dir: Path, image: Path, instruction: str, out: Path, options: SamplingOptions) -> str:
    """Edit the middle square of a picture of any size, write one of the model's size, return what was done."""
    recipe = fit_recipe(run_dir, "edit")
    preset = preset_of(recipe)
    words, _ = _prompt(recipe, instruction, edits=True)
    source = middle_square(image, preset.image_size)
    check_picture(out, image)

    def pictures(model: Forward, noise: Tensor, sampling: SamplingShape) -> Tensor:
        return drawing.edit(model, source.expand(options.number, -1, -1, -1), [words] * options.number, noise, sampling)

    request = f"{image}, its middle square at {preset.image_size} pixels; edit : {words}"
    return _drawn(run_dir, "edit", pictures, request, out, options)


def routes(run_dir: Path, prompt: str, out: Path, image: Path | None = None) -> str:
    """Draw which of the language model's layers each token of a prompt takes; return the same as a table.

    With a picture to edit the prompt is an instruction.
    """
    recipe = fit_recipe(run_dir, "routes" if image is None else "edit")
    preset = preset_of(recipe)
    _, tokens = _prompt(recipe, prompt, edits=image is not None)
    source = None if image is None else middle_square(image, preset.image_size)[None]
    check_picture(out, image)
    run = load_run(run_dir, "routes")
    routed = route(run.forward, tokens, source)
    write_picture(routes_picture(routed), out)
    return f"{run}\n{routes_table(routed)}\n{out}"


def reconstruct(run_dir: Path, image: Path, out: Path) -> str:
    """Pass a picture of any size through the run's tokenizer and back; write it, return what was done."""
    fit_recipe(run_dir, "reconstruct")
    picture = open_image(image)
    check_picture(out, image)
    run = load_run(run_dir, "reconstruct")
    result = reconstruct_image(run.forward, picture, run.preset.image_size)
    write_picture(result, out)
    return f"{out}: {image} through {run}, PSNR {image_psnr(result, picture):.2f} dB"


def _prompt(recipe: Recipe, typed: str, edits: bool = False) -> tuple[str, list[int]]:
    """Return what was typed as the tokenizer reads it, and its prompt. UserError for unknown words and too many."""
    preset, text = preset_of(recipe), text_of_run(recipe)
    words = text.normalize(typed, "prompt")
    tokens = text.editing_prompt(words, preset.image_tokens) if edits else text.generation_prompt(words)
    check_length(len(tokens), preset, queries=preset.conditioning.num_queries)
    return words, tokens


def _drawn(
    run_dir: Path,
    use: Command,
    pictures: Callable[[Forward, Tensor, SamplingShape], Tensor],
    request: str,
    out: Path,
    options: SamplingOptions,
) -> str:
    """Load the run, draw from the noise of the seeds, write the pictures side by side."""
    sampling = options.sampling(preset_of(fit_recipe(run_dir, use)))
    run: TrainedRun = load_run(run_dir, use)
    seeds = range(options.seed, options.seed + options.number)
    images = pictures(run.forward, seeded_noise(run.preset.latent_shape, seeds), sampling)
    write_picture(sheet([to_image(image) for image in images]), out)
    named = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    how = f"{sampling.steps} steps, guidance {sampling.guidance:g}, flow shift {sampling.flow_shift:g}"
    return f"{run}\n{request}\n{out}: {named}, {how}"
