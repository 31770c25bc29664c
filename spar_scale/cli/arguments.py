"""What each command of the command line takes; what it is for, `--help` says in the words of its body's docstring."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from parallel.optimizers import OPTIMIZERS
from spar_scale import phases
from spar_scale.cli import commands as do
from spar_scale.data.tables import FORMS

Body = Callable[[argparse.Namespace], int]
Commands = argparse._SubParsersAction
_RECIPE = "recipe file (YAML)"
_OVERRIDE = (
    "value that replaces the file's: as it stands where the key has a text (quotes around it are taken off), else YAML"
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; `run` of its result is the command's body."""
    parser = argparse.ArgumentParser(prog="spar-scale", description="Pretrain SPAR, on a laptop or a cluster.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in _COMMANDS:
        add(commands)
    return parser


def _train(commands: Commands) -> None:
    _recipe(_command(commands, "train", do.train, started_per_rank=True))


def _parity(commands: Commands) -> None:
    parity = _command(commands, "parity", do.parity)
    parity.add_argument("--recipe", type=Path, required=True, help=_RECIPE)
    parity.add_argument("--layouts", default="all", help="e.g. dp2-z1,tp2-pp2 (default: all of 1, 2 and 4 processes)")
    parity.add_argument("--steps", type=_positive, default=10, help="steps of each run (default 10)")
    parity.add_argument("--out", type=Path, help="directory of the runs, which then stay (default: a fresh one)")
    parity.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="adamw", help="muon: in its own, wider band")
    parity.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: in a band that is measured"
    )
    parity.add_argument("--resumed", action="store_true", help="save under each of five layouts, resume under each")
    _overrides(parity)


def _plan(commands: Commands) -> None:
    plan = _command(commands, "plan", do.plan)
    _recipe(plan)
    plan.add_argument("--gpus", type=_positive, required=True, help="how many GPUs")
    plan.add_argument("--gpu", default="h200", help="which: h200 (default), h100-80, a100-80, b200")
    plan.add_argument("--json", action="store_true", help="print everything, for programs")
    plan.add_argument("--check-rank", type=int, metavar="R", help="build rank R of the recipe's own layout, check it")


def _data(commands: Commands) -> None:
    data = _group(commands, "data", "make, index and look at shards")
    make = _command(data, "make", do.make)
    make.add_argument("world", type=Path, help="settings of the world (YAML)")
    _overrides(make)
    make.add_argument("--out", type=Path, required=True, help="directory of the shards")
    index = _command(data, "index", do.index)
    index.add_argument("paths", nargs="+", metavar="PATH", help="shards (paths or globs)")
    imported = _command(data, "import", do.import_data)
    imported.add_argument("folder", type=Path, help="pictures with texts of their names, or captions.csv or .jsonl")
    imported.add_argument("--task", choices=FORMS, default="generation", help="what the samples train (%(default)s)")
    imported.add_argument("--out", type=Path, required=True, help="directory of the shards, new or empty")
    imported.add_argument("--size", type=_positive, help="shrink pictures to this shorter side, in pixels")
    imported.add_argument("--check-words", action="store_true", help="count words that the miniature does not know")
    show = _command(data, "show", do.show)
    show.add_argument("paths", nargs="+", metavar="PATH", help="shards (paths or globs)")
    show.add_argument("--count", type=_positive, default=8, help="how many samples (default 8)")
    show.add_argument("-o", "--out", type=Path, metavar="PICTURE", help="write the images as one picture")
    _recipe(_command(data, "encode", do.encode), f"{_RECIPE} with data.encoded, the directory to write")


def _checkpoint(commands: Commands) -> None:
    checkpoint = _group(commands, "checkpoint", "inspect and verify checkpoints")
    inspect = _command(checkpoint, "inspect", do.inspect)
    inspect.add_argument("path", type=Path, help="checkpoint or run directory")
    verify = _command(checkpoint, "verify", do.verify)
    verify.add_argument("path", type=Path, help="checkpoint or run directory")


def _track(commands: Commands) -> None:
    track = _group(commands, "track", "send metrics to MLflow")
    sync = _command(track, "sync", do.track_sync)
    sync.add_argument("path", type=Path, help="run directory, or the directory that holds them")
    sync.add_argument("--uri", help="server or database to send it to (default: the recipe's tracking.uri)")


def _doctor(commands: Commands) -> None:
    doctor = _command(commands, "doctor", do.doctor, started_per_rank=True)
    _recipe(doctor, f"{_RECIPE}, or a folder of them: whether they can be trained here now, too", nargs="?")


def _cluster(commands: Commands) -> None:
    cluster = _group(commands, "cluster", "what the scripts of cluster/ run")
    _recipe(_command(cluster, "job", do.cluster_job))
    node = _command(cluster, "node", do.cluster_node, started_per_rank=True)
    node.add_argument("words", nargs=argparse.REMAINDER, metavar="WORD", help="a command of spar-scale")
    submit = _command(cluster, "submit", do.cluster_submit)
    submit.add_argument("folder", type=Path, metavar="RECIPE_DIR", help="folder of recipes, one for each phase")
    submit.add_argument("root", type=Path, metavar="RUN_DIR", help="directory of the runs, one for each phase")
    submit.add_argument("--dry-run", action="store_true", help="print the lines, submit nothing")
    submit.add_argument("options", nargs=argparse.REMAINDER, metavar="OPTION", help="options of sbatch, for every job")


def _demo(commands: Commands) -> None:
    demo = _command(commands, "demo", do.demo)
    demo.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="directory of all that it writes (default runs/demo)"
    )
    demo.add_argument("--size", choices=("demo", "smoke", "full"), default="demo", help="which recipes (default demo)")
    demo.add_argument("--seed", type=_seed, default=0, help="seed of the runs (default 0)")
    demo.add_argument("--jobs", type=_positive, help="phases side by side (default 2; 1 where there is one core)")


def _rehearse(commands: Commands) -> None:
    parser = _command(commands, "rehearse", do.rehearse)
    parser.add_argument("folder", type=Path, metavar="RECIPE_DIR", help="folder of recipes, such as recipes/spar_1b")
    parser.add_argument("--out", type=Path, help="new directory of all that it writes (default runs/rehearse-FOLDER)")
    parser.add_argument(
        "--preset",
        choices=("thin", "nano"),
        default="thin",
        help="published widths, few layers (default); or tiny ones",
    )
    parser.add_argument("--phases", nargs="+", default=[], metavar="PHASE", help="these, and what they start from")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="directory with a published tokenizer.json")
    parser.add_argument("--no-train", action="store_true", help="only write the recipes, pictures and random weights")


def _evaluate(commands: Commands) -> None:
    evaluate = _command(commands, "evaluate", do.evaluate)
    evaluate.add_argument(
        "run_dir", type=Path, help="directory of the phases (of the demo), or the run directory of one of them"
    )
    evaluate.add_argument("--quick", action="store_true", help="few samples, to see it run")


def _ablate(commands: Commands) -> None:
    ablate = _command(commands, "ablate", do.ablate)
    ablate.add_argument(
        "--out",
        type=Path,
        default=Path("runs/ablation"),
        help="directory of all that it writes (default runs/ablation)",
    )
    ablate.add_argument("--size", choices=("demo", "smoke"), default="demo", help="as of the demo")
    ablate.add_argument("--seeds", type=_positive, default=2, help="how many seeds (default 2)")
    ablate.add_argument(
        "--row", action="append", dest="rows", help="only this row and what it is compared with (may be repeated)"
    )
    ablate.add_argument("--jobs", type=_positive, help="runs side by side (default 2; 1 where there is one core)")
    _overrides(ablate)


def _report(commands: Commands) -> None:
    report = _command(commands, "report", do.report)
    report.add_argument("run_dir", type=Path, help="directory of the chain's runs, or one of them")


def _export(commands: Commands) -> None:
    export = _run_command(commands, "export", do.export)
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write, which must be new")
    export.add_argument("--precision", choices=("fp32", "bf16"), help="of the weights (default: the run's)")


def _generate(commands: Commands) -> None:
    generate = _run_command(commands, "generate", do.generate)
    generate.add_argument("prompt", help='what to draw, in one word of the shell: "a red circle on the left"')
    _drawing(generate)


def _edit(commands: Commands) -> None:
    edit = _run_command(commands, "edit", do.edit)
    edit.add_argument("image", type=Path, help="image file of any size; its middle square is edited")
    edit.add_argument("instruction", help='what to change, in one word of the shell: "make the circle blue"')
    _drawing(edit)


def _routes(commands: Commands) -> None:
    routes = _run_command(commands, "routes", do.routes)
    routes.add_argument("prompt", help="a prompt, in one word of the shell; with --image an instruction")
    routes.add_argument("--image", type=Path, help="image file to edit")
    _png(routes)


def _reconstruct(commands: Commands) -> None:
    reconstruct = _run_command(commands, "reconstruct", do.reconstruct)
    reconstruct.add_argument("image", type=Path, help="image file")
    _png(reconstruct)


def _ask(commands: Commands) -> None:
    ask = _run_command(commands, "ask", do.ask)
    ask.add_argument("image", type=Path, help="image file")
    ask.add_argument("question", help='the question, in one word of the shell: "what color is the circle?"')


_COMMANDS = (
    *(_train, _parity, _plan, _data, _checkpoint, _track, _doctor, _cluster),
    *(_demo, _rehearse, _evaluate, _ablate, _report),
    *(_export, _generate, _edit, _routes, _reconstruct, _ask),
)
"""In the order of `--help`."""


def _group(parent: Commands, name: str, text: str) -> Commands:
    """Add a command that has commands of its own, and return these."""
    return parent.add_parser(name, help=text).add_subparsers(metavar="COMMAND", required=True)


def _command(parent: Commands, name: str, run: Body, started_per_rank: bool = False) -> argparse.ArgumentParser:
    description = run.__doc__ or ""
    parser = parent.add_parser(
        name, help=description[:1].lower() + description[1:].rstrip("."), description=description
    )
    parser.set_defaults(run=run, started_per_rank=started_per_rank)
    return parser


def _run_command(parent: Commands, name: phases.Command, run: Body) -> argparse.ArgumentParser:
    """Add a command on a run directory of the phases that declare it, or on what `export` wrote."""
    parser = _command(parent, name, run)
    accepted = phases.either([phase.name for phase in phases.accepted_by(name)])
    exported = "" if name == "export" else ", or a directory that export wrote"
    parser.add_argument("run_dir", type=Path, help=f"run directory of {accepted}{exported}")
    return parser


def _recipe(parser: argparse.ArgumentParser, text: str = _RECIPE, nargs: str | None = None) -> None:
    parser.add_argument("recipe", type=Path, nargs=nargs, help=text)
    _overrides(parser)


def _overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", default=[], metavar="a.b=c", help=_OVERRIDE)


def _png(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        required=True,
        metavar="PICTURE",
        help="where to write it (.png, .jpg, .jpeg or .webp)",
    )


def _drawing(parser: argparse.ArgumentParser) -> None:
    _png(parser)
    parser.add_argument("--seed", type=_seed, default=0, help="seed of the noise (default 0)")
    parser.add_argument("--number", type=_positive, default=1, help="how many pictures, of seeds one apart (default 1)")
    parser.add_argument("--steps", type=_positive, help="steps of the sampler (default: the preset's)")
    parser.add_argument(
        "--guidance", type=_guidance, help="strength of the words, 1 for none added (default: the preset's)"
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {text}, must be 1 or more")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**62:
        raise argparse.ArgumentTypeError(f"found {text}, must be 0 or more and below 2^62")
    return value


def _guidance(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text}, must be a number from 0")
    return value
