"""What each command of the command line does: its arguments handed to the module that does it, its exit code.

A module is imported by the command that needs it, so a recipe is refused before torch is there.
"""

from __future__ import annotations

import argparse
import sys

DIFFERS = 1
"""Exit code of `parity` where a layout does not give the curve."""


def train(arguments: argparse.Namespace) -> int:
    """Train what a recipe describes, or go on where its run stopped."""
    from spar_scale.config.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from spar_scale.training.trainer import train

    return train(recipe)


def parity(arguments: argparse.Namespace) -> int:
    """Train a recipe under several layouts, compare with one process."""
    from spar_scale.config.recipe import load_recipe

    load_recipe(arguments.recipe, arguments.overrides)  # refused at once, where it is to be
    from spar_scale.runs.parity import Runs, parity

    runs = Runs(arguments.steps, arguments.optimizer, arguments.precision, arguments.resumed)
    within = parity(arguments.recipe, arguments.overrides, arguments.layouts, runs, arguments.out)
    return 0 if within else DIFFERS


def plan(arguments: argparse.Namespace) -> int:
    """Say what each layout of a recipe costs on so many GPUs, without any."""
    from spar_scale.config.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from spar_scale.planning.plan import plan

    if arguments.rehearse_rank is not None:
        from spar_scale.planning.rehearsal import rehearse

        return _print_text(rehearse(recipe, arguments.gpus, arguments.rehearse_rank))
    found = plan(recipe, arguments.gpus, arguments.gpu)
    return _print_text(found.json() if arguments.json else found.text())


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
    """Write pictures and captions of your own as shards."""
    from spar_scale.data.importing import import_folder

    return _print_text(import_folder(arguments.folder, arguments.out, arguments.size, arguments.check_words))


def show(arguments: argparse.Namespace) -> int:
    """Print samples, or draw them."""
    from spar_scale.data.commands import show

    show(arguments.paths, arguments.count, arguments.out)
    return 0


def encode(arguments: argparse.Namespace) -> int:
    """Store what a recipe's frozen parts make of its samples."""
    from spar_scale.config.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from spar_scale.training.encode import encode

    return _print_text(encode(recipe))


def inspect(arguments: argparse.Namespace) -> int:
    """Print what a checkpoint holds."""
    from parallel.checkpoint import inspect

    return _print_text(inspect(arguments.path))


def verify(arguments: argparse.Namespace) -> int:
    """Compare every file with the manifest."""
    from parallel.checkpoint import verify

    return _print_text(verify(arguments.path))


def track_sync(arguments: argparse.Namespace) -> int:
    """Send MLflow what it lacks of a run, or of all runs of a directory."""
    from spar_scale.training.mlflow_sync import sync

    return _print_text(sync(arguments.path, arguments.uri))


def doctor(arguments: argparse.Namespace) -> int:
    """Say what is installed here and whether it fits together; with a recipe, whether it can be trained here now."""
    if arguments.recipe is None:
        from spar_scale.doctor.machine import report

        return report()
    from spar_scale.config.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from spar_scale.doctor.preflight import preflight

    return preflight(recipe)


def cluster_job(arguments: argparse.Namespace) -> int:
    """Look at the nodes of this job, train on them, and have the job go on later if need be."""
    from spar_scale.cluster.job import run_job

    return run_job(arguments.recipe, arguments.overrides)


def cluster_node(arguments: argparse.Namespace) -> int:
    """Run a command as the ranks of this node, one for each GPU."""
    from spar_scale.cluster.node import run_node

    return run_node(arguments.words)


def cluster_submit(arguments: argparse.Namespace) -> int:
    """Submit every phase of a folder of recipes, each as a job that waits for those it starts from."""
    from spar_scale.cluster.submit import submit

    return _print_text(submit(arguments.folder, arguments.root, arguments.options, arguments.dry_run))


def demo(arguments: argparse.Namespace) -> int:
    """Make the miniature world, train all of SPAR on it, score and show it."""
    try:
        from spar_scale.runs.demo import run

        run(arguments.out, arguments.size, arguments.seed, arguments.jobs)
    except KeyboardInterrupt:
        print("stopped; the same command again resumes from here", file=sys.stderr)
        raise
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    """Score trained phases on held-out data, each with its control."""
    from spar_scale.evaluation.evaluate import QUICK, Counts, evaluate

    scores = evaluate(arguments.run_dir, QUICK if arguments.quick else Counts())
    return _print_text("\n".join(f"{name:42} {value:g}" for name, value in scores.items()))


def ablate(arguments: argparse.Namespace) -> int:
    """Train what each switch of SPAR changes, compare on held-out data."""
    from spar_scale.runs.ablation import ablate

    seeds = range(arguments.seeds)
    return _print_text(
        ablate(arguments.out, arguments.size, seeds, arguments.rows, arguments.overrides, arguments.jobs)
    )


def report(arguments: argparse.Namespace) -> int:
    """Write the report of a trained chain, one HTML file."""
    from spar_scale.evaluation.report import write_report

    return _print_text(str(write_report(arguments.run_dir)))


def generate(arguments: argparse.Namespace) -> int:
    """Draw a picture from words."""
    from spar_scale.inference.commands import generate

    return _print_text(generate(arguments.run_dir, arguments.prompt, arguments.out, _sampling_options(arguments)))


def edit(arguments: argparse.Namespace) -> int:
    """Change a picture as an instruction says."""
    from spar_scale.inference.commands import edit

    return _print_text(
        edit(arguments.run_dir, arguments.image, arguments.instruction, arguments.out, _sampling_options(arguments))
    )


def _sampling_options(arguments: argparse.Namespace):
    from spar_scale.inference.commands import SamplingOptions

    return SamplingOptions(arguments.seed, arguments.number, arguments.steps, arguments.guidance)


def routes(arguments: argparse.Namespace) -> int:
    """Show which layers of the language model each token takes."""
    from spar_scale.inference.commands import routes

    return _print_text(routes(arguments.run_dir, arguments.prompt, arguments.out, arguments.image))


def reconstruct(arguments: argparse.Namespace) -> int:
    """Pass an image through a trained tokenizer."""
    from spar_scale.inference.commands import reconstruct

    return _print_text(reconstruct(arguments.run_dir, arguments.image, arguments.out))


def ask(arguments: argparse.Namespace) -> int:
    """Answer a question about an image."""
    from spar_scale.inference.ask import ask

    return _print_text(ask(arguments.run_dir, arguments.image, arguments.question))


def _print_text(text: str) -> int:
    print(text)
    return 0
