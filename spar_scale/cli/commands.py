"""The commands of the command line: each passes its arguments to a module and returns the exit code.

A command imports its module itself, so that a bad recipe is refused before torch is imported.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

DIFFERS = 1
"""Exit code of `parity` if a layout gives another curve, and of `rehearse` if something was not shown."""


def train(arguments: argparse.Namespace) -> int:
    """Train a recipe, or resume its run."""
    from spar_scale.config.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from spar_scale.training.trainer import train

    return train(recipe)


def parity(arguments: argparse.Namespace) -> int:
    """Train a recipe under several layouts, compare with one process."""
    from spar_scale.config.recipe import load_recipe

    load_recipe(arguments.recipe, arguments.overrides)  # refuses a bad recipe before the slow imports
    from spar_scale.runs.parity import Runs, parity

    runs = Runs(arguments.steps, arguments.optimizer, arguments.precision, arguments.resumed)
    within = parity(arguments.recipe, arguments.overrides, arguments.layouts, runs, arguments.out)
    return 0 if within else DIFFERS


def plan(arguments: argparse.Namespace) -> int:
    """Estimate the costs of each layout of a recipe on a number of GPUs."""
    from spar_scale.config.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from spar_scale.planning.plan import plan

    if arguments.check_rank is not None:
        from spar_scale.planning.rank_check import check_rank

        return _print_text(check_rank(recipe, arguments.gpus, arguments.check_rank))
    result = plan(recipe, arguments.gpus, arguments.gpu)
    return _print_text(result.json() if arguments.json else result.text())


def make(arguments: argparse.Namespace) -> int:
    """Write a miniature world as shards."""
    from spar_scale.config.settings import load
    from spar_scale.data.commands import make
    from spar_scale.data.shapes_world import World

    make(load(arguments.world, World, arguments.overrides), arguments.out)
    return 0


def index(arguments: argparse.Namespace) -> int:
    """Write the tar index beside each shard."""
    from spar_scale.data.commands import index

    index(arguments.paths)
    return 0


def import_data(arguments: argparse.Namespace) -> int:
    """Write the user's pictures and captions as shards."""
    from spar_scale.data.importing import import_folder

    given = arguments.folder, arguments.out, arguments.size, arguments.check_words, arguments.task
    return _print_text(import_folder(*given))


def show(arguments: argparse.Namespace) -> int:
    """Print samples, and optionally write their pictures as a contact sheet."""
    from spar_scale.data.commands import show

    show(arguments.paths, arguments.count, arguments.out)
    return 0


def encode(arguments: argparse.Namespace) -> int:
    """Store the outputs of a recipe's frozen parts for its samples."""
    from spar_scale.config.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from spar_scale.training.encode import encode

    return _print_text(encode(recipe))


def inspect(arguments: argparse.Namespace) -> int:
    """Print the contents of a checkpoint."""
    from parallel.checkpoint import inspect

    return _print_text(inspect(arguments.path))


def verify(arguments: argparse.Namespace) -> int:
    """Compare every file of a checkpoint with its manifest."""
    from parallel.checkpoint import verify

    return _print_text(verify(arguments.path))


def track_sync(arguments: argparse.Namespace) -> int:
    """Send to MLflow the missing values of a run, or of all runs in a directory."""
    from spar_scale.training.mlflow_sync import sync

    return _print_text(sync(arguments.path, arguments.uri))


def doctor(arguments: argparse.Namespace) -> int:
    """Check the installation; with a recipe or a folder of them, check whether it can be trained here now."""
    if arguments.recipe is None:
        from spar_scale.doctor.machine import report

        return report()
    from spar_scale.config.recipe import load_folder, load_recipe

    if arguments.recipe.is_dir():
        recipes = load_folder(arguments.recipe, arguments.overrides)
        from spar_scale.doctor.folder import check_folder

        return check_folder(list(recipes.values()))
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from spar_scale.doctor.preflight import preflight

    return preflight(recipe)


def cluster_job(arguments: argparse.Namespace) -> int:
    """Check the nodes of this job, train on them, and requeue the job if necessary."""
    from spar_scale.cluster.job import run_job

    return run_job(arguments.recipe, arguments.overrides)


def cluster_node(arguments: argparse.Namespace) -> int:
    """Run a command as the ranks of this node, one per GPU."""
    from spar_scale.cluster.node import run_node

    return run_node(arguments.words)


def cluster_submit(arguments: argparse.Namespace) -> int:
    """Submit every phase of a folder of recipes as a job that waits for the phases it starts from."""
    from spar_scale.cluster.submit import submit

    return _print_text(submit(arguments.folder, arguments.root, arguments.options, arguments.dry_run))


def demo(arguments: argparse.Namespace) -> int:
    """Make the miniature world, train all of SPAR on it, evaluate it and write the report."""
    try:
        from spar_scale.runs.demo import run

        run(arguments.out, arguments.size, arguments.seed, arguments.jobs)
    except KeyboardInterrupt:
        print("stopped; the same command again resumes from here", file=sys.stderr)
        raise
    return 0


def rehearse(arguments: argparse.Namespace) -> int:
    """Train all phases of a folder of full-size recipes for some steps on this machine, with random thin models."""
    from spar_scale.runs.rehearsal import rehearse

    out = arguments.out or Path("runs") / f"rehearse-{arguments.folder.resolve().name}"
    shown = rehearse(
        arguments.folder, out, arguments.preset, arguments.phases, arguments.tokenizer, not arguments.no_train
    )
    return 0 if shown else DIFFERS


def evaluate(arguments: argparse.Namespace) -> int:
    """Score trained phases on held-out data, each with its control."""
    from spar_scale.evaluation.evaluate import QUICK, Counts, evaluate

    scores = evaluate(arguments.run_dir, QUICK if arguments.quick else Counts())
    return _print_text("\n".join(f"{name:42} {value:g}" for name, value in scores.items()))


def ablate(arguments: argparse.Namespace) -> int:
    """Train variants of SPAR and compare them on held-out data."""
    from spar_scale.runs.ablation import ablate

    seeds = range(arguments.seeds)
    return _print_text(
        ablate(arguments.out, arguments.size, seeds, arguments.rows, arguments.overrides, arguments.jobs)
    )


def report(arguments: argparse.Namespace) -> int:
    """Write the report of a trained chain, one HTML file."""
    from spar_scale.evaluation.report import write_report

    return _print_text(str(write_report(arguments.run_dir)))


def export(arguments: argparse.Namespace) -> int:
    """Write a trained SPAR as one directory that needs neither the run nor its starting weights."""
    from spar_scale.inference.commands import export

    return _print_text(export(arguments.run_dir, arguments.out, arguments.precision))


def generate(arguments: argparse.Namespace) -> int:
    """Generate a picture from a prompt."""
    from spar_scale.inference.commands import generate

    return _print_text(generate(arguments.run_dir, arguments.prompt, arguments.out, _sampling_options(arguments)))


def edit(arguments: argparse.Namespace) -> int:
    """Edit a picture by an instruction."""
    from spar_scale.inference.commands import edit

    return _print_text(
        edit(arguments.run_dir, arguments.image, arguments.instruction, arguments.out, _sampling_options(arguments))
    )


def _sampling_options(arguments: argparse.Namespace):
    from spar_scale.inference.commands import SamplingOptions

    return SamplingOptions(arguments.seed, arguments.number, arguments.steps, arguments.guidance)


def routes(arguments: argparse.Namespace) -> int:
    """Show the routing weights of each token over the language model's layers."""
    from spar_scale.inference.commands import routes

    return _print_text(routes(arguments.run_dir, arguments.prompt, arguments.out, arguments.image))


def reconstruct(arguments: argparse.Namespace) -> int:
    """Pass an image through a trained tokenizer."""
    from spar_scale.inference.commands import reconstruct

    return _print_text(reconstruct(arguments.run_dir, arguments.image, arguments.out))


def ask(arguments: argparse.Namespace) -> int:
    """Answer a question about an image."""
    from spar_scale.inference.commands import ask

    return _print_text(ask(arguments.run_dir, arguments.image, arguments.question))


def _print_text(text: str) -> int:
    print(text)
    return 0
