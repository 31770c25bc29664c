"""What each command of the command line takes; what it is for, `--help` says in the words of its body's docstring."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from parallel.optimizers import OPTIMIZERS
from spar_scale import phases
from spar_scale.cli import commands as do

Command = Callable[[argparse.Namespace], int]
_OVERRIDE = (
    "value that replaces the file's: as it stands where the key has a text (quotes around it are taken off), else YAML"
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; `run` of its result is the command's body."""
    parser = argparse.ArgumentParser(prog="spar-scale", description="Pretrain SPAR, on a laptop or a cluster.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    train = _command(commands, "train", do.train, started_per_rank=True)
    train.add_argument("recipe", type=Path, help="recipe file (YAML)")
    _overrides(train)

    parity = _command(commands, "parity", do.parity)
    parity.add_argument("--recipe", type=Path, required=True, help="recipe file (YAML)")
    parity.add_argument("--layouts", default="all", help="e.g. dp2-z1,tp2-pp2 (default: all of 1, 2 and 4 processes)")
    parity.add_argument("--steps", type=_positive, default=10, help="steps of each run (default 10)")
    parity.add_argument("--out", type=Path, help="directory of the runs, which then stay (default: a fresh one)")
    parity.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="adamw", help="muon: in its own, wider band")
    parity.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: in a band that is measured"
    )
    parity.add_argument("--resumed", action="store_true", help="save under each of five layouts, resume under each")
    _overrides(parity)

    plan = _command(commands, "plan", do.plan)
    plan.add_argument("recipe", type=Path, help="recipe file (YAML)")
    _overrides(plan)
    plan.add_argument("--gpus", type=_positive, required=True, help="how many GPUs")
    plan.add_argument("--gpu", default="h200", help="which: h200 (default), h100-80, a100-80, b200")
    plan.add_argument("--json", action="store_true", help="print everything, for programs")
    plan.add_argument(
        "--rehearse-rank", type=int, metavar="R", help="build rank R of the recipe's own layout, check it"
    )

    data = commands.add_parser("data", help="make, index and look at shards").add_subparsers(
        metavar="COMMAND", required=True
    )
    make = _command(data, "make", do.make)
    make.add_argument("world", type=Path, help="settings of the world (YAML)")
    _overrides(make)
    make.add_argument("--out", type=Path, required=True, help="directory of the shards")
    index = _command(data, "index", do.index)
    index.add_argument("paths", nargs="+", metavar="PATH", help="shards (paths or globs)")
    brought = _command(data, "import", do.import_data)
    brought.add_argument("folder", type=Path, help="pictures with texts of their names, or captions.csv or .jsonl")
    brought.add_argument("--out", type=Path, required=True, help="directory of the shards, new or empty")
    brought.add_argument("--size", type=_positive, help="shrink pictures to this shorter side, in pixels")
    brought.add_argument("--check-words", action="store_true", help="count words that the miniature does not know")
    show = _command(data, "show", do.show)
    show.add_argument("paths", nargs="+", metavar="PATH", help="shards (paths or globs)")
    show.add_argument("--count", type=_positive, default=8, help="how many samples (default 8)")
    show.add_argument("-o", "--out", type=Path, metavar="PICTURE", help="write the images as one picture")

    encode = _command(data, "encode", do.encode)
    encode.add_argument("recipe", type=Path, help="recipe file (YAML) with data.encoded, the directory to write")
    _overrides(encode)

    checkpoint = commands.add_parser("checkpoint", help="inspect and verify checkpoints").add_subparsers(
        metavar="COMMAND", required=True
    )
    inspect = _command(checkpoint, "inspect", do.inspect)
    inspect.add_argument("path", type=Path, help="checkpoint or run directory")
    verify = _command(checkpoint, "verify", do.verify)
    verify.add_argument("path", type=Path, help="checkpoint or run directory")

    track = commands.add_parser("track", help="send metrics to MLflow").add_subparsers(metavar="COMMAND", required=True)
    sent = _command(track, "sync", do.track_sync)
    sent.add_argument("path", type=Path, help="run directory, or the directory that holds them")
    sent.add_argument("--uri", help="server or database to send it to (default: the recipe's tracking.uri)")

    doctor = _command(commands, "doctor", do.doctor, started_per_rank=True)
    doctor.add_argument(
        "recipe", type=Path, nargs="?", help="recipe file (YAML): whether this machine can train it now, too"
    )
    _overrides(doctor)

    cluster = commands.add_parser("cluster", help="what the scripts of cluster/ run").add_subparsers(
        metavar="COMMAND", required=True
    )
    job = _command(cluster, "job", do.cluster_job)
    job.add_argument("recipe", type=Path, help="recipe file (YAML)")
    _overrides(job)
    node = _command(cluster, "node", do.cluster_node, started_per_rank=True)
    node.add_argument("words", nargs=argparse.REMAINDER, metavar="WORD", help="a command of spar-scale")
    submit = _command(cluster, "submit", do.cluster_submit)
    submit.add_argument("folder", type=Path, metavar="RECIPE_DIR", help="folder of recipes, one for each phase")
    submit.add_argument("root", type=Path, metavar="RUN_DIR", help="directory of the runs, one for each phase")
    submit.add_argument("--dry-run", action="store_true", help="print the lines, submit nothing")
    submit.add_argument("options", nargs=argparse.REMAINDER, metavar="OPTION", help="options of sbatch, for every job")

    demo = _command(commands, "demo", do.demo)
    demo.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="directory of all that it writes (default runs/demo)"
    )
    demo.add_argument("--size", choices=("demo", "smoke", "full"), default="demo", help="which recipes (default demo)")
    demo.add_argument("--seed", type=_seed, default=0, help="seed of the runs (default 0)")
    demo.add_argument("--jobs", type=_positive, help="phases side by side (default 2; 1 where there is one core)")

    evaluate = _command(commands, "evaluate", do.evaluate)
    evaluate.add_argument(
        "run_dir", type=Path, help="directory of the phases (of the demo), or the run directory of one of them"
    )
    evaluate.add_argument("--quick", action="store_true", help="few samples, to see it run")

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

    report = _command(commands, "report", do.report)
    report.add_argument("run_dir", type=Path, help="directory of the chain's runs, or one of them")

    generate = _command(commands, "generate", do.generate)
    generate.add_argument("run_dir", type=Path, help=_runs_for("generate"))
    generate.add_argument("prompt", help='what to draw, in one word of the shell: "a red circle on the left"')
    _drawing(generate)

    edit = _command(commands, "edit", do.edit)
    edit.add_argument("run_dir", type=Path, help=_runs_for("edit"))
    edit.add_argument("image", type=Path, help="image file of any size; its middle square is edited")
    edit.add_argument("instruction", help='what to change, in one word of the shell: "make the circle blue"')
    _drawing(edit)

    routes = _command(commands, "routes", do.routes)
    routes.add_argument("run_dir", type=Path, help=_runs_for("routes"))
    routes.add_argument("prompt", help="a prompt, in one word of the shell; with --image an instruction")
    routes.add_argument("--image", type=Path, help="image file to edit")
    _png(routes)

    reconstruct = _command(commands, "reconstruct", do.reconstruct)
    reconstruct.add_argument("run_dir", type=Path, help=_runs_for("reconstruct"))
    reconstruct.add_argument("image", type=Path, help="image file")
    _png(reconstruct)

    ask = _command(commands, "ask", do.ask)
    ask.add_argument("run_dir", type=Path, help=_runs_for("ask"))
    ask.add_argument("image", type=Path, help="image file")
    ask.add_argument("question", help='the question, in one word of the shell: "what color is the circle?"')
    return parser


def _command(
    parent: argparse._SubParsersAction, name: str, run: Command, started_per_rank: bool = False
) -> argparse.ArgumentParser:
    said = run.__doc__ or ""
    parser = parent.add_parser(name, help=said[:1].lower() + said[1:].rstrip("."), description=said)
    parser.set_defaults(run=run, started_per_rank=started_per_rank)
    return parser


def _runs_for(command: phases.Command) -> str:
    return f"run directory of {phases.either([phase.name for phase in phases.accepted_by(command)])}"


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
