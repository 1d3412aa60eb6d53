"""The command line: `mtl-jax train | eval | infer | convert | tasks | report`.

Only the standard library is imported here; each command's modules are imported when it runs, so
that help and usage errors come at once. Exit status: 0 success, 1 a user's mistake (one line on
stderr), 2 a malformed command line (and `precompile`: it does not fit), 75 told to stop, saved and
to be continued by the same command, 130 interrupted.
"""

import argparse
import dataclasses
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from mtl_jax import __version__
from mtl_jax.errors import Stopped, UserError, suggest

GIN_FLAG = "--gin."
TO_BE_CONTINUED = 75  # exit status; sysexits.h: a temporary failure, try again


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and end with exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Prints the error and where help is, and exits."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that choose a configuration; `config.load_args` reads them."""
    group = parser.add_argument_group("configuration")
    group.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="a Gin file; repeatable, later values replace earlier ones",
    )
    group.add_argument(
        # Taken out by `parse` before argparse sees it; here for the help.
        f"{GIN_FLAG}NAME=VALUE",
        dest="gin_bindings",
        action="append_const",
        const="",
        default=[],
        help="one value (NAME is like Run.steps, or a macro); beats all files; repeatable",
    )
    group.add_argument(
        "--gin_search_paths",
        action="append",
        default=[],
        metavar="FOLDER",
        help="where Gin files are sought after the working directory and before the files of the "
        "package; repeatable, or several with commas",
    )


def _process_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of a job of several processes; `processes.start` reads them."""
    group = parser.add_argument_group(
        "several processes",
        "found out on a TPU pod, under SLURM, Open MPI and Kubernetes; else start each with",
    )
    group.add_argument(
        "--coordinator_address", metavar="HOST:PORT", help="where process 0 is to be reached"
    )
    group.add_argument("--num_processes", type=int, metavar="N", help="processes of the job")
    group.add_argument("--process_id", type=int, metavar="I", help="of this one, from 0 on")
    group.add_argument(
        "--process_start_timeout",
        type=int,
        default=300,
        metavar="SECONDS",
        help="how long to wait for the others to start; default: %(default)s",
    )
    group.add_argument(
        "--process_timeout",
        type=int,
        default=60,
        metavar="SECONDS",
        help="the job ends if a process gives no sign of life for so long; default: %(default)s",
    )


def _train_flags(parser: argparse.ArgumentParser) -> None:
    add_config_flags(parser)
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="resolve everything and print parameters, shardings, memory, FLOPs and the mixture; "
        "train nothing",
    )
    _process_flags(parser)


def _eval_flags(parser: argparse.ArgumentParser) -> None:
    add_config_flags(parser)
    parser.add_argument(
        "--checkpoint",
        default="",
        metavar="PATH",
        help="a run directory, or one step in its checkpoints folder; default: the newest "
        "checkpoint of Run.directory",
    )
    _process_flags(parser)


def _infer_flags(parser: argparse.ArgumentParser) -> None:
    add_config_flags(parser)
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a run directory or one step in it, a converted checkpoint, a Hugging Face folder",
    )
    parser.add_argument(
        "--input",
        required=True,
        metavar="FILE",
        help='rows {"inputs": ..., "targets": ..., "prefix": ...}, one JSON object a line; targets '
        "(a text or a list of texts) for --mode score, prefix to be continued, if given",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        help="the same rows with prediction or score; an unfinished file is continued",
    )
    parser.add_argument(
        "--mode", choices=("generate", "score"), default="generate", help="default: %(default)s"
    )


def _convert_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SRC",
        help="a Hugging Face directory, a T5X checkpoint, a run directory or one of its "
        "checkpoints, or a converted checkpoint; which of them is found out",
    )
    parser.add_argument("target", metavar="DST", help="a new folder")
    parser.add_argument("--to", required=True, choices=("hf", "mtl_jax"), help="the format of DST")
    parser.add_argument("--step", type=int, help="of a run; default: the newest")
    parser.add_argument(
        "--task",
        metavar="NAME",
        help="of a run whose tasks have parameters of their own: whose plain T5 is written; or a "
        "cluster, or '*' for the mean of all",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="a spiece.model or a folder of tokenizer files to carry along instead of SRC's",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of --to hf's tensors"
    )
    parser.add_argument(
        "--max_shard_size", default="5GB", metavar="SIZE", help="of --to hf's files, such as 500MiB"
    )
    parser.add_argument(
        "--optimizer",
        choices=("drop", "keep"),
        default="drop",
        help="drop or keep its state; keep: that of T5X's Adafactor, with --to mtl_jax",
    )
    parser.add_argument(
        "--relpos_max_distance",
        type=int,
        metavar="N",
        help="T5.relpos_max_distance of a T5X checkpoint, which does not tell it; default: 128",
    )
    parser.add_argument(
        "--mlp_activations",
        metavar="NAMES",
        help="T5.mlp_activations of a T5X checkpoint, with commas; default: relu, or gelu,linear "
        "where it has a gate",
    )


def _report_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_dirs", nargs="+", metavar="RUN_DIR", help="folder of a run or of a sweep"
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="write one report over all the sweeps and runs into this folder; default: a report "
        "for each, beside its files; of --compare: where to write, default: here",
    )
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help="of sweeps: also write zeroshot/DATASET/mean, median and iqr as TensorBoard scalars",
    )
    parser.add_argument(
        "--representations",
        action="store_true",
        help="load each run's newest checkpoint and embed evaluation inputs of its tasks, for a "
        "map of the tasks",
    )
    parser.add_argument(
        "--examples",
        type=int,
        metavar="N",
        help="of --representations: inputs of each dataset at most; default: 64",
    )
    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--compare",
        action="store_true",
        help="write comparison.html, .json and .md over all the runs, methods x seeds; runs on one "
        "task alone are the baselines of that task",
    )
    group.add_argument(
        "--tasks",
        nargs=2,
        metavar=("A", "B"),
        default=[],
        help="of --compare: the tasks of a trade-off plot; default: those whose gradients conflict "
        "most",
    )
    group.add_argument(
        "--lower_is_better",
        action="append",
        default=[],
        metavar="METRIC",
        help="of --compare: a metric that counts mistakes; loss, perplexity, error, wer and their "
        "like are known; repeatable",
    )


def _compare_flags(parser: argparse.ArgumentParser) -> None:
    add_config_flags(parser)
    parser.add_argument(
        "--dry_run", action="store_true", help="check every run and list them; train nothing"
    )


def _sweep_flags(parser: argparse.ArgumentParser) -> None:
    add_config_flags(parser)
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="list the cells with their rows, tokens and time, and what is done; evaluate nothing",
    )
    _process_flags(parser)


def _flags_of_module(module: str, *, config: bool) -> Callable[[argparse.ArgumentParser], None]:
    def add(parser: argparse.ArgumentParser) -> None:
        if config:
            add_config_flags(parser)
        importlib.import_module(module).add_arguments(parser)

    return add


@dataclasses.dataclass(frozen=True)
class Command:
    """One sub-command: its flags, and the function `module.function(args)` that does it."""

    summary: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    module: str
    function: str
    examples: str
    reads_data: bool = False
    config: str = "mtl_jax.config"  # whose `load_args` reads the Gin flags


COMMANDS = {
    "train": Command(
        "train a model (and evaluate it) from Gin files",
        _train_flags,
        "mtl_jax.train",
        "main",
        "mtl-jax train --gin_file=runs/quickstart.gin --gin.Run.steps=100",
        reads_data=True,
    ),
    "eval": Command(
        "evaluate the newest checkpoint of a run",
        _eval_flags,
        "mtl_jax.train",
        "evaluate_main",
        "mtl-jax eval --gin_file=runs/quickstart/config.gin --gin.Eval.split=test",
        reads_data=True,
    ),
    "precompile": Command(
        "compile a run for TPUs or GPUs that are not here: does it fit?",
        _flags_of_module("mtl_jax.precompile_config", config=True),
        "mtl_jax.precompile",
        "main",
        "mtl-jax precompile --gin_file=gin/runs/xl_v5e_64.gin --topology=v5e:8x8",
        reads_data=True,
    ),
    "compare": Command(
        "train methods x seeds and each task alone, and compare them",
        _compare_flags,
        "mtl_jax.compare",
        "main",
        "mtl-jax compare --gin_file=gin/runs/methods.gin",
        reads_data=True,
        config="mtl_jax.compare_config",
    ),
    "sweep": Command(
        "evaluate checkpoints x tasks x prompts x shots, zero-shot",
        _sweep_flags,
        "mtl_jax.sweep",
        "main",
        "mtl-jax sweep --gin_file=gin/runs/zero_shot.gin --dry_run",
        reads_data=True,
        config="mtl_jax.sweep_config",
    ),
    "infer": Command(
        "generate or score the rows of a JSONL file",
        _infer_flags,
        "mtl_jax.infer",
        "main",
        "mtl-jax infer --checkpoint=runs/quickstart --input=in.jsonl --output=out.jsonl \\\n"
        "    --gin.Generate.method=beam --gin.Generate.num_beams=4",
    ),
    "convert": Command(
        "convert between Hugging Face, T5X and mtl_jax checkpoints",
        _convert_flags,
        "mtl_jax.interop.convert",
        "main",
        "mtl-jax convert t5-v1_1-base converted --to mtl_jax\n"
        "  mtl-jax convert runs/quickstart exported --to hf --step 1000",
    ),
    "tasks": Command(
        "list the registered tasks, or show examples of one",
        _flags_of_module("mtl_jax.tasks_main", config=False),
        "mtl_jax.tasks_main",
        "main",
        "mtl-jax tasks\n  mtl-jax tasks show NAME",
        reads_data=True,
    ),
    "decontaminate": Command(
        "find evaluation examples in the training mixture, and list what not to train on",
        _flags_of_module("mtl_jax.decontaminate", config=True),
        "mtl_jax.decontaminate",
        "main",
        "mtl-jax decontaminate --gin_file=gin/mixtures/p3.gin --against 'super_glue_*' \\\n"
        "    --split=validation --output=overlap.json --remove=leaks.jsonl",
        reads_data=True,
    ),
    "report": Command(
        "write report.html from the files of a run or a sweep, or compare several",
        _report_flags,
        "mtl_jax.report_main",
        "main",
        "mtl-jax report runs/quickstart\n"
        "  mtl-jax report runs/sweep_a runs/sweep_b --output both\n"
        "  mtl-jax report --compare runs/*_seed* --output comparison",
    ),
}


def build_parser(chosen: str = "") -> Parser:
    """Returns the parser; only the `chosen` command has its flags (others may be slow)."""
    parser = Parser(
        prog="mtl-jax",
        description="Multi-task T5 in JAX: train from one Gin file, evaluate zero-shot.",
        epilog="mtl-jax COMMAND --help describes a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mtl-jax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(
            name,
            help=command.summary,
            description=command.summary[0].upper() + command.summary[1:] + ".",
            epilog=f"example:\n  {command.examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        subparser.add_argument(
            "--debug", action="store_true", help="show the traceback of a user's mistake, too"
        )
        if name == chosen:
            command.add_flags(subparser)
    return parser


def _flags_of(parser: argparse.ArgumentParser, command: str) -> list[str]:
    """Returns the option strings of a command, for suggestions."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return [flag for a in action.choices[command]._actions for flag in a.option_strings]
    return []


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the parsed command line; exits with status 2 and one line when it is malformed.

    `--gin.NAME=VALUE` flags are in `gin_bindings` as "NAME=VALUE", in order.
    """
    chosen = next((word for word in argv if not word.startswith("-")), "")
    parser = build_parser(chosen if chosen in COMMANDS else "")
    if chosen and chosen not in COMMANDS:
        parser.error(f"no command {chosen!r}.{suggest(chosen, COMMANDS)}")
    bindings = [word.removeprefix(GIN_FLAG) for word in argv if word.startswith(GIN_FLAG)]
    words = [word for word in argv if not word.startswith(GIN_FLAG)]
    args, unknown = parser.parse_known_args(words)
    if args.command is None and not unknown:
        return args
    known = _flags_of(parser, args.command) if args.command else ["--version", "--help"]
    if bindings and not hasattr(args, "gin_bindings"):
        unknown = [GIN_FLAG + bindings[0], *unknown]
    if unknown:
        flag = unknown[0].split("=")[0]
        near = " Write it after the command." if flag in known else suggest(flag, known)
        where = f"{parser.prog} {args.command}" if args.command else parser.prog
        kind = "flag" if unknown[0].startswith("-") else "argument"
        parser.exit(2, f"{where}: unknown {kind} {unknown[0]!r}.{near} (see {where} --help)\n")
    if hasattr(args, "gin_bindings"):
        args.gin_bindings = bindings
        paths = [path for given in args.gin_search_paths for path in given.split(",")]
        args.gin_search_paths = [path for path in paths if path]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the words after the program's name; None: those of this process.

    Returns:
        The exit status.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        build_parser().print_help()
        return 0
    args = parse(words)
    args.argv = words
    # TensorFlow only reads data here; its notices would bury ours. Level 3 and not 2, because XLA
    # calls it an error when it loads compiled programs for a CPU; real errors are exceptions.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    command = COMMANDS[args.command]
    try:
        if command.reads_data and hasattr(args, "gin_file"):
            # Mistakes in it are told now, not after TensorFlow's ten seconds of import.
            importlib.import_module(command.config).load_args(args)
        # Orbax reports every file it writes.
        importlib.import_module("absl.logging").set_verbosity("error")
        if hasattr(args, "coordinator_address"):
            importlib.import_module("mtl_jax.processes").start(args)
        if command.reads_data:
            importlib.import_module("mtl_jax.quiet_tensorflow").load()
        status = getattr(importlib.import_module(command.module), command.function)(args)
        sys.stdout.flush()
        return status or 0
    except UserError as error:
        if args.debug:
            traceback.print_exc()
        print(f"mtl-jax {args.command}: {error}", file=sys.stderr)
        return _stop(1)
    except Stopped as stopped:
        print(f"mtl-jax {args.command}: {stopped}", file=sys.stderr)
        return TO_BE_CONTINUED
    except KeyboardInterrupt:
        print(f"mtl-jax {args.command}: interrupted", file=sys.stderr)
        return _stop(130)
    except BrokenPipeError:
        # The reader (head, less) has gone; keep the interpreter's last flush from failing, too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if _job() is None:
            raise
        traceback.print_exc()
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        print(
            f"mtl-jax {args.command}: process {_job()} stops ({reason[:200]}). Where this tells of "
            "a lost connection, another process has ended: look at what that one said.",
            file=sys.stderr,
        )
        return _stop(1)


def _job() -> str | None:
    """This process' place in a job of several, in words; None: it is alone."""
    processes = sys.modules.get("mtl_jax.processes")
    return processes.place() if processes is not None and processes.several() else None


def _stop(status: int) -> int:
    """The exit status of a failure; a process of a job ends here, as the others wait for it."""
    if _job() is not None:
        sys.modules["mtl_jax.processes"].abort(status)
    return status
