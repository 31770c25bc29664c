"""`spar-scale rehearse FOLDER`: the whole chain of a folder of recipes on a laptop, before it costs a GPU.

Random weights in the published layouts, the published vocabulary and generated photographs in the public shard formats
are written to a directory. Every phase then trains some fp32 steps of its recipe by the code of `spar-scale train`: it
saves, is killed by SIGKILL, resumes from its checkpoint under another layout, repeats the killed step with the same
loss, and exports. The last phase draws, edits and answers with free text. What is not shown: quality, speed, bf16 and
GPUs; the presets have the published widths and few layers.
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from parallel.errors import UserError
from parallel.launch.children import sigterm_interrupts
from spar_scale.config.recipe import Recipe
from spar_scale.files.outputs import make_directory
from spar_scale.inference import commands
from spar_scale.phases import phase_of
from spar_scale.runs.curves import curve
from spar_scale.runs.processes import import_before_forks, threads
from spar_scale.runs.ranks import run_ranks
from spar_scale.runs.rehearsal.meter import Meter
from spar_scale.runs.rehearsal.parts import write_part
from spar_scale.runs.rehearsal.photographs import PHOTOGRAPH, write_photographs
from spar_scale.runs.rehearsal.recipes import SAVED, STEPS, Rehearsed, rehearsed_phases, save_recipes
from spar_scale.runs.rehearsal.table import Row, table
from spar_scale.runs.rehearsal.text import check_source, write_tokenizer
from spar_scale.training.progress import progress_sent_to
from spar_scale.training.trainer import train

EXPORTED = "exported"
TEXTS = {
    "export": "",
    "generate": "A red bicycle leans against a wall of bricks, in the rain.",
    "edit": "Make it night, and add 3 lanterns!",
    "ask": "What's the colour of the sky?",
}
"""Command on the last run, or on what was exported of it -> the free text that it is given."""
DRAWING = commands.SamplingOptions(steps=2)


@sigterm_interrupts()
def rehearse(
    folder: Path, out: Path, form: str, wanted: Sequence[str] = (), tokenizer: Path | None = None, trains: bool = True
) -> bool:
    """Write everything to `out`, train all phases of `folder` there, use the last run; return whether all was shown.

    `wanted`: only these phases, with those that they start from. `trains`: else everything is only written. Raises
    UserError for a directory that is not empty, and for what `train` and the commands refuse.
    """
    make_directory(out, "--out")
    out = out.resolve()
    if any(out.iterdir()):
        raise UserError(f"--out: found {out}, which is not empty; expected a new or empty directory")
    check_source(tokenizer)
    phases = rehearsed_phases(folder, out, form, list(wanted))
    import_before_forks(mlflow=False)
    meter, rows = Meter(), [Row("pictures and weights")]
    try:
        with meter.measure() as rows[0].measured:
            run_ranks(functools.partial(_write, phases, out, tokenizer), 1)
        rows[0].trained, rows[0].faults = f"{out}, preset {phases[0].preset.name}", []
        if not trains:
            return True
        for phase in phases:
            print(f"\n{phase.name}: the recipe as written, but\n{phase.told()}", flush=True)
            rows.append(Row(phase.name))
            with meter.measure() as rows[-1].measured:
                _train(phase, rows[-1])
        for command in (use for use in TEXTS if use in phase_of(phases[-1].recipe).used_by):
            rows.append(Row(command, trained=TEXTS[command]))
            with meter.measure() as rows[-1].measured:
                run_ranks(functools.partial(_use, command, phases[-1].recipe.run_dir, out), 1)
            rows[-1].faults = []
    finally:
        meter.close()
        print(f"\n{table(rows)}", flush=True)
        spent, peak = sum(row.measured.core_s for row in rows), max(row.measured.peak_bytes for row in rows)
        print(f"{spent / 60:.1f} core-minutes; at most {peak / 2**30:.1f} GiB in all processes together", flush=True)
    return not any(row.faults for row in rows)


def _write(phases: Sequence[Rehearsed], out: Path, tokenizer: Path | None) -> None:
    """Write recipes, pictures, and each pretrained part once. Runs in a process of its own."""
    torch.set_num_threads(threads(1))
    save_recipes(phases, out / "recipes")
    write_photographs(out / "data")
    written: dict[Path, str] = {}
    for phase in phases:
        for part, directory in phase.written_parts.items():
            layout = "mllm" if part in phase_of(phase.recipe).vision_only else part
            if written.setdefault(directory, layout) != layout:
                raise UserError(f"{phase.name}: {directory} is {written[directory]} in one recipe, {layout} in another")
            if not directory.exists():
                write_part(part, layout, directory, phase.preset)
                if layout == "mllm":
                    write_tokenizer(directory, tokenizer)


def _train(phase: Rehearsed, row: Row) -> None:
    """Train a phase until it is killed, resume it to its end under another layout, and fill the row."""
    recipe, declared = phase.recipe, phase_of(phase.recipe)
    try:
        run_ranks(functools.partial(_attempt, recipe, STEPS), 1)
    except UserError:
        if len(killed := _curve(recipe)) < STEPS:  # it was not our kill
            raise
    else:
        raise RuntimeError(f"{phase.name} was not killed")
    layout = phase.resumed_at
    sizes = {"tensor": layout.tensor, "pipeline": layout.pipeline, "zero": layout.zero, "micro_batch": 1}
    parallel = recipe.parallel.model_copy(update=sizes)
    run_ranks(functools.partial(_attempt, recipe.model_copy(update={"parallel": parallel})), layout.processes)
    row.compare(killed, _curve(recipe), SAVED, f"1 process to {layout.name}", phase.tasks())
    row.trained += phase.reduced()
    if declared.publishes is not None:
        row.exported = declared.publishes
        if not (recipe.run_dir / "pretrained" / "config.json").is_file():
            row.faults.append("nothing was exported")


def _curve(recipe: Recipe) -> list[tuple[float, float]]:
    return curve(recipe.run_dir) if (recipe.run_dir / "metrics.jsonl").exists() else []


def _attempt(recipe: Recipe, killed_after: int | None = None) -> None:
    """Train in a rank; the process is killed when step `killed_after` is trained and not yet saved."""
    torch.set_num_threads(threads(int(os.environ["WORLD_SIZE"])))

    def listen(done: int, steps: int, note: str) -> None:
        print(f"{recipe.phase}: step {done}/{steps} {note}", flush=True)
        if done == killed_after:
            os.kill(os.getpid(), signal.SIGKILL)

    with progress_sent_to(listen):
        train(recipe)


def _use(command: str, run_dir: Path, out: Path) -> None:
    """Export a run, or use the exported directory by one of the commands; its picture is written to `out`."""
    torch.set_num_threads(threads(1))
    exported, picture, text, drawn = out / EXPORTED, out / "data" / PHOTOGRAPH, TEXTS[command], out / f"{command}.png"
    uses: dict[str, Callable[[], str]] = {
        "export": lambda: commands.export(run_dir, exported, None),
        "generate": lambda: commands.generate(exported, text, drawn, DRAWING),
        "edit": lambda: commands.edit(exported, picture, text, drawn, DRAWING),
        "ask": lambda: commands.ask(exported, picture, text),
    }
    print(uses[command](), flush=True)
