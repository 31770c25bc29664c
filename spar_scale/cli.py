"""The command line: `spar-scale train | parity | plan | data | checkpoint | track | doctor | demo | evaluate | report |
ablate`, and of a trained run `generate | edit | routes | reconstruct | ask`.

Nothing heavy is imported until a command needs it, so `--help` and a refused recipe take a fraction
of a second where importing torch alone takes one. A refusal (`UserError`) is one message on stderr
and exit code 2; an interrupt is 130; everything else is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from parallel.errors import UserError

DIFFERS = 1
REFUSED = 2
INTERRUPTED = 130
# What the disk or its owner refuses; the person can mend it, so it is no defect of ours.
_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS})

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    strangers = rest
    if hasattr(arguments, "overrides"):  # argparse loses `a.b=c` behind an option
        arguments.overrides += [word for word in rest if _is_override(word)]
        strangers = [word for word in rest if not _is_override(word)]
    if strangers:
        parser.error(f"unknown argument: {strangers[0]}")
    _start_log()
    try:
        return arguments.run(arguments)
    except UserError as error:
        return _refuse(str(error), error.everywhere)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        return _refuse(f"{error.filename or 'disk'}: {error.strerror}", everywhere=False)
    except KeyboardInterrupt:
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; `run` of its result is the command's body."""
    parser = argparse.ArgumentParser(prog="spar-scale", description="Pretrain SPAR, on a laptop or a cluster.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    train = _command(commands, "train", _train, "train what a recipe describes, or go on where its run stopped")
    train.add_argument("recipe", type=Path, help="recipe file (YAML)")
    _overrides(train)

    parity = _command(commands, "parity", _parity, "train a recipe under several layouts, compare with one process")
    parity.add_argument("--recipe", type=Path, required=True, help="recipe file (YAML)")
    parity.add_argument("--layouts", default="all", help="e.g. dp2-z1,tp2-pp2 (default: all of 1, 2 and 4 processes)")
    parity.add_argument("--steps", type=_positive, default=10, help="steps of each run (default 10)")
    parity.add_argument("--out", type=Path, help="directory of the runs, which then stay (default: a fresh one)")
    parity.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw", help="muon: in its own, wider band")
    parity.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: in a band that is measured"
    )
    parity.add_argument("--resumed", action="store_true", help="save under each of five layouts, resume under each")
    _overrides(parity)

    plan = _command(commands, "plan", _plan, "say what each layout of a recipe costs on so many GPUs, without any")
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
    make = _command(data, "make", _make, "write a miniature world as shards")
    make.add_argument("world", type=Path, help="settings of the world (YAML)")
    _overrides(make)
    make.add_argument("--out", type=Path, required=True, help="directory of the shards")
    index = _command(data, "index", _index, "write the tar index beside each shard")
    index.add_argument("paths", nargs="+", metavar="PATH", help="shards (paths or globs)")
    brought = _command(data, "import", _import, "write pictures and captions of your own as shards")
    brought.add_argument("folder", type=Path, help="pictures with texts of their names, or captions.csv or .jsonl")
    brought.add_argument("--out", type=Path, required=True, help="directory of the shards, new or empty")
    brought.add_argument("--size", type=_positive, help="shrink pictures to this shorter side, in pixels")
    brought.add_argument("--check-words", action="store_true", help="count words that the miniature does not know")
    show = _command(data, "show", _show, "print samples, or draw them")
    show.add_argument("paths", nargs="+", metavar="PATH", help="shards (paths or globs)")
    show.add_argument("--count", type=_positive, default=8, help="how many samples (default 8)")
    show.add_argument("-o", "--out", type=Path, metavar="PNG", help="write the images as one picture")

    encode = _command(data, "encode", _encode, "store what a recipe's frozen parts make of its samples")
    encode.add_argument("recipe", type=Path, help="recipe file (YAML) with data.encoded, the directory to write")
    _overrides(encode)

    checkpoint = commands.add_parser("checkpoint", help="look at and check checkpoints").add_subparsers(
        metavar="COMMAND", required=True
    )
    inspect = _command(checkpoint, "inspect", _inspect, "print what a checkpoint holds")
    inspect.add_argument("path", type=Path, help="checkpoint or run directory")
    verify = _command(checkpoint, "verify", _verify, "compare every file with the manifest")
    verify.add_argument("path", type=Path, help="checkpoint or run directory")

    track = commands.add_parser("track", help="what MLflow is told").add_subparsers(metavar="COMMAND", required=True)
    sent = _command(track, "sync", _track_sync, "send MLflow what it lacks of a run, or of all runs of a directory")
    sent.add_argument("path", type=Path, help="run directory, or the directory that holds them")
    sent.add_argument("--uri", help="server or database to send it to (default: the recipe's tracking.uri)")

    _command(commands, "doctor", _doctor, "say what is installed here and whether it fits together")

    demo = _command(commands, "demo", _demo, "make the miniature world, train all of SPAR on it, score and show it")
    demo.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="directory of all that it writes (default runs/demo)"
    )
    demo.add_argument("--size", choices=("demo", "smoke", "full"), default="demo", help="which recipes (default demo)")
    demo.add_argument("--seed", type=_seed, default=0, help="seed of the runs (default 0)")
    demo.add_argument("--jobs", type=_positive, help="phases side by side (default 2; 1 where there is one core)")

    evaluate = _command(commands, "evaluate", _evaluate, "score trained phases on held-out data, each with its control")
    evaluate.add_argument(
        "run_dir", type=Path, help="directory of the phases (of the demo), or the run directory of one of them"
    )
    evaluate.add_argument("--quick", action="store_true", help="few samples, to see it run")

    ablate = _command(commands, "ablate", _ablate, "train what each switch of SPAR changes, compare on held-out data")
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

    report = _command(commands, "report", _report, "write the report of a trained chain, one HTML file")
    report.add_argument("run_dir", type=Path, help="directory of the chain's runs, or one of them")

    generate = _command(commands, "generate", _generate, "draw a picture from words")
    generate.add_argument(
        "run_dir", type=Path, help="run directory of stage align or instruct, or of bootstrap_diffusion"
    )
    generate.add_argument("prompt", help='what to draw, in one word of the shell: "a red circle on the left"')
    _drawing(generate)

    edit = _command(commands, "edit", _edit, "change a picture as an instruction says")
    edit.add_argument("run_dir", type=Path, help="run directory of stage align, phase joint, or of instruct")
    edit.add_argument("image", type=Path, help="image file of any size; its middle square is edited")
    edit.add_argument("instruction", help='what to change, in one word of the shell: "make the circle blue"')
    _drawing(edit)

    routes = _command(commands, "routes", _routes, "show which layers of the language model each token takes")
    routes.add_argument("run_dir", type=Path, help="run directory of stage align or instruct")
    routes.add_argument("prompt", help="a prompt, in one word of the shell; with --image an instruction")
    routes.add_argument("--image", type=Path, help="image file to edit")
    _png(routes)

    reconstruct = _command(commands, "reconstruct", _reconstruct, "pass an image through a trained tokenizer")
    reconstruct.add_argument("run_dir", type=Path, help="run directory of a phase with a tokenizer or autoencoder")
    reconstruct.add_argument("image", type=Path, help="image file")
    _png(reconstruct)

    ask = _command(commands, "ask", _ask, "answer a question about an image")
    ask.add_argument(
        "run_dir", type=Path, help="run directory of bootstrap_mllm, of align's phase joint, or of instruct"
    )
    ask.add_argument("image", type=Path, help="image file")
    ask.add_argument("question", help='the question, in one word of the shell: "what color is the circle?"')
    return parser


def _train(arguments: argparse.Namespace) -> int:
    from spar_scale.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from spar_scale.training.trainer import train

    return train(recipe)


def _parity(arguments: argparse.Namespace) -> int:
    from spar_scale.recipe import load_recipe

    load_recipe(arguments.recipe, arguments.overrides)  # refused at once, where it is to be
    from spar_scale.parity import Runs, parity

    runs = Runs(arguments.steps, arguments.optimizer, arguments.precision, arguments.resumed)
    within = parity(arguments.recipe, arguments.overrides, arguments.layouts, runs, arguments.out)
    return 0 if within else DIFFERS


def _plan(arguments: argparse.Namespace) -> int:
    from spar_scale.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from spar_scale.planning import plan, rehearse

    if arguments.rehearse_rank is not None:
        return _say(rehearse(recipe, arguments.gpus, arguments.rehearse_rank))
    found = plan(recipe, arguments.gpus, arguments.gpu)
    return _say(found.json() if arguments.json else found.text())


def _make(arguments: argparse.Namespace) -> int:
    from spar_scale.data.commands import make
    from spar_scale.data.shapes_world import World
    from spar_scale.settings import load

    make(load(arguments.world, World, arguments.overrides), arguments.out)
    return 0


def _index(arguments: argparse.Namespace) -> int:
    from spar_scale.data.commands import index

    index(arguments.paths)
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from spar_scale.data.importing import import_folder

    return _say(import_folder(arguments.folder, arguments.out, arguments.size, arguments.check_words))


def _show(arguments: argparse.Namespace) -> int:
    from spar_scale.data.commands import show

    show(arguments.paths, arguments.count, arguments.out)
    return 0


def _encode(arguments: argparse.Namespace) -> int:
    from spar_scale.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from spar_scale.training.encode import encode

    return _say(encode(recipe))


def _inspect(arguments: argparse.Namespace) -> int:
    from parallel.checkpoint import inspect

    return _say(inspect(arguments.path))


def _verify(arguments: argparse.Namespace) -> int:
    from parallel.checkpoint import verify

    return _say(verify(arguments.path))


def _track_sync(arguments: argparse.Namespace) -> int:
    from spar_scale.training.mlflow_sync import sync

    return _say(sync(arguments.path, arguments.uri))


def _doctor(arguments: argparse.Namespace) -> int:
    from spar_scale.doctor import report

    return report()


def _demo(arguments: argparse.Namespace) -> int:
    try:
        from spar_scale.demo import run

        run(arguments.out, arguments.size, arguments.seed, arguments.jobs)
    except KeyboardInterrupt:
        print("stopped; the same command again goes on from here", file=sys.stderr)
        raise
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from spar_scale.evaluation.evaluate import QUICK, Counts, evaluate

    scores = evaluate(arguments.run_dir, QUICK if arguments.quick else Counts())
    return _say("\n".join(f"{name:42} {value:g}" for name, value in scores.items()))


def _ablate(arguments: argparse.Namespace) -> int:
    from spar_scale.ablation import ablate

    seeds = range(arguments.seeds)
    return _say(ablate(arguments.out, arguments.size, seeds, arguments.rows, arguments.overrides, arguments.jobs))


def _report(arguments: argparse.Namespace) -> int:
    from spar_scale.evaluation.report import write_report

    return _say(str(write_report(arguments.run_dir)))


def _generate(arguments: argparse.Namespace) -> int:
    from spar_scale.inference.commands import generate

    return _say(generate(arguments.run_dir, arguments.prompt, arguments.out, _wishes(arguments)))


def _edit(arguments: argparse.Namespace) -> int:
    from spar_scale.inference.commands import edit

    return _say(edit(arguments.run_dir, arguments.image, arguments.instruction, arguments.out, _wishes(arguments)))


def _wishes(arguments: argparse.Namespace):
    from spar_scale.inference.commands import Wishes

    return Wishes(arguments.seed, arguments.number, arguments.steps, arguments.guidance)


def _routes(arguments: argparse.Namespace) -> int:
    from spar_scale.inference.commands import routes

    return _say(routes(arguments.run_dir, arguments.prompt, arguments.out, arguments.image))


def _reconstruct(arguments: argparse.Namespace) -> int:
    from spar_scale.inference.commands import reconstruct

    return _say(reconstruct(arguments.run_dir, arguments.image, arguments.out))


def _ask(arguments: argparse.Namespace) -> int:
    from spar_scale.inference.ask import ask

    return _say(ask(arguments.run_dir, arguments.image, arguments.question))


def _command(parent: argparse._SubParsersAction, name: str, run: Command, what: str) -> argparse.ArgumentParser:
    parser = parent.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
    parser.set_defaults(run=run)
    return parser


def _overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", default=[], metavar="a.b=c", help="values laid over the file's")


def _png(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="PNG", help="where to write it")


def _drawing(parser: argparse.ArgumentParser) -> None:
    _png(parser)
    parser.add_argument("--seed", type=_seed, default=0, help="seed of the noise (default 0)")
    parser.add_argument("--number", type=_positive, default=1, help="how many pictures, of seeds one apart (default 1)")
    parser.add_argument("--steps", type=_positive, help="steps of the sampler (default: the preset's)")
    parser.add_argument(
        "--guidance", type=_guidance, help="strength of the words, 1 for none added (default: the preset's)"
    )


def _is_override(word: str) -> bool:
    return "=" in word and not word.startswith("-")


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


def _say(text: str) -> int:
    print(text)
    return 0


def _refuse(message: str, everywhere: bool) -> int:
    """Print a refusal: the first process in any case, another one only what it alone may have found."""
    rank = _rank()
    if rank == "0":
        print(f"error: {message}", file=sys.stderr)
    elif not everywhere and "torch" in sys.modules:  # before that every process reads the same files
        print(f"error (rank {rank}): {message}", file=sys.stderr)
    return REFUSED


def _start_log() -> None:
    """Log lines are plain text on stderr, from the first process of a launch only."""
    level = logging.INFO if _rank() == "0" else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s")


def _rank() -> str:
    return os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"


if __name__ == "__main__":
    sys.exit(main())
