"""Bodies of the commands that use a trained run or an exported directory.

Each checks what it is given before it loads anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from spar_scale.files.outputs import check_picture, make_directory, write_picture
from spar_scale.inference.drawing import sampling_of
from spar_scale.inference.exports import write_export
from spar_scale.inference.pictures import fitted, image_psnr, open_image, sheet
from spar_scale.inference.pipeline import SparPipeline
from spar_scale.inference.routes import route, routes_picture, routes_table
from spar_scale.inference.runs import (
    editing_fit,
    editing_prompt,
    fit_recipe,
    generation_prompt,
    load_run,
    question_prompt,
    text_of_run,
)
from spar_scale.models.spar import SamplingShape
from spar_scale.stages.parts import preset_of
from spar_scale.training.export import recipe_of


@dataclass(frozen=True)
class SamplingOptions:
    """How to draw: pictures of the seeds seed, seed + 1, ...; None stands for the preset's own value."""

    seed: int = 0
    number: int = 1
    steps: int | None = None
    guidance: float | None = None


def export(run_dir: Path, out: Path, precision: Literal["fp32", "bf16"] | None) -> str:
    """Write a trained SPAR as one directory; return what was written."""
    recipe_of(run_dir)  # an exported directory is no run
    recipe = fit_recipe(run_dir, "export")
    make_directory(out.absolute().parent, "--out")
    return write_export(recipe, out, precision)


def generate(run_dir: Path, prompt: str, out: Path, options: SamplingOptions) -> str:
    """Draw a prompt, write the picture, return what was done."""
    recipe = fit_recipe(run_dir, "generate")
    words, _ = generation_prompt(preset_of(recipe), text_of_run(recipe), prompt)
    check_picture(out)
    sampling = sampling_of(preset_of(recipe), options.steps, options.guidance)
    pipeline = SparPipeline(load_run(run_dir, "generate"))
    pictures = pipeline.generate([words] * options.number, options.seed, options.steps, options.guidance)
    return _drawn(pipeline, pictures, f"draw : {words}", out, options, sampling)


def edit(run_dir: Path, image: Path, instruction: str, out: Path, options: SamplingOptions) -> str:
    """Edit a picture of any size, write one of the model's size, return what was done."""
    recipe = fit_recipe(run_dir, "edit")
    preset = preset_of(recipe)
    words, _ = editing_prompt(preset, text_of_run(recipe), instruction)
    fit = editing_fit(recipe)
    fitted(image, preset.image_size, fit)  # refuses what is no picture
    check_picture(out, image)
    sampling = sampling_of(preset, options.steps, options.guidance)
    pipeline = SparPipeline(load_run(run_dir, "edit"))
    pictures = pipeline.edit(image, [words] * options.number, options.seed, options.steps, options.guidance)
    seen = "its middle square" if fit == "crop" else "stretched"
    request = f"{image}, {seen} at {preset.image_size} pixels; edit : {words}"
    return _drawn(pipeline, pictures, request, out, options, sampling)


def routes(run_dir: Path, prompt: str, out: Path, image: Path | None = None) -> str:
    """Draw which of the language model's layers each token of a prompt takes; return the same as a table.

    With a picture to edit the prompt is an instruction.
    """
    recipe = fit_recipe(run_dir, "routes" if image is None else "edit")
    preset = preset_of(recipe)
    _, tokens = (generation_prompt if image is None else editing_prompt)(preset, text_of_run(recipe), prompt)
    source = None if image is None else fitted(image, preset.image_size, editing_fit(recipe))[None]
    check_picture(out, image)
    run = load_run(run_dir, "routes")
    routed = route(run.forward, tokens, source)
    write_picture(routes_picture(routed), out)
    return f"{run}\n{routes_table(routed)}\n{out}"


def reconstruct(run_dir: Path, image: Path, out: Path) -> str:
    """Pass a picture of any size through the image tokenizer and back; write it, return what was done."""
    fit_recipe(run_dir, "reconstruct")
    picture = open_image(image)
    check_picture(out, image)
    run = load_run(run_dir, "reconstruct")
    result = SparPipeline(run).reconstruct(picture)
    write_picture(result, out)
    return f"{out}: {image} through {run}, PSNR {image_psnr(result, picture):.2f} dB"


def ask(run_dir: Path, image: Path, question: str) -> str:
    """Answer a question about a picture of any size; return the answer and, on a second line, who gave it.

    Raises UserError for a run without a language model and for words that it does not know.
    """
    recipe = fit_recipe(run_dir, "ask")
    preset = preset_of(recipe)
    words, _ = question_prompt(preset, text_of_run(recipe), question)
    picture = open_image(image)
    run = load_run(run_dir, "ask")
    reply = SparPipeline(run).ask(picture, words)
    return f"{reply}\n({run}; {image} at {preset.image_size} pixels)"


def _drawn(
    pipeline: SparPipeline,
    pictures: list[Image.Image],
    request: str,
    out: Path,
    options: SamplingOptions,
    sampling: SamplingShape,
) -> str:
    """Write the pictures side by side, return what was done."""
    write_picture(sheet(pictures), out)
    seeds = range(options.seed, options.seed + options.number)
    named = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    how = f"{sampling.steps} steps, guidance {sampling.guidance:g}, flow shift {sampling.flow_shift:g}"
    return f"{pipeline.run}\n{request}\n{out}: {named}, {how}"
