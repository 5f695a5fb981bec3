"""The command line: `python -m braidax train`, `report`, `summary` and `bench`."""

import argparse
import dataclasses
import datetime
import io
import os
import pathlib
import sys
from typing import Any, NoReturn

from ._bench.candidates import DIRECTIONS
from ._checks import one_line
from ._training.settings import Settings, UserError, flag

_KINDS: dict[Any, dict[str, Any]] = {
    bool: {"action": "store_true"},
    int: {"type": int, "metavar": "N"},
    float: {"type": float, "metavar": "RATE"},
    str | None: {"type": str, "metavar": "PATH"},
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line and exit code 2, without the usage text that argparse puts before it."""
        self.fail(f"{message} (try --help)")

    def fail(self, message: str) -> NoReturn:
        """The same where the help would not help."""
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for a mistake of the user's, 130 or 143."""
    parser = _Parser(prog="python -m braidax", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    _add_train(commands)
    _add_report(commands)
    _add_summary(commands)
    _add_bench(commands)
    # A path may hold bytes that are no text; printing it must not end the run.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    options = vars(parser.parse_args(arguments))
    run = options.pop("run")
    command_parser: _Parser = options.pop("parser")
    del options["command"]
    try:
        return run(options)
    except UserError as error:
        command_parser.fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _add_train(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "train",
        allow_abbrev=False,
        help="train a small byte-level language model with mixture-of-experts layers",
        description="Train a small byte-level language model, one mixture-of-experts block a"
        " layer, and report bits per byte and expert balance on held-out text.",
        epilog="Ctrl-C or SIGTERM finishes the step, saves a checkpoint and prints the command"
        " that continues the run.",
    )
    parser.add_argument(
        "--out",
        type=_folder,
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="folder for checkpoint.eqx, metrics.csv, report.json and balance.png"
        " (default: runs/<UTC date and time>)",
    )
    parser.add_argument(
        "--resume",
        type=_folder,
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="continue the run in DIR exactly where its checkpoint stands; all settings come from"
        " the checkpoint, so no other option is allowed",
    )
    parser.add_argument(
        "--expert-parallel",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="spread the experts over N devices; what is left over of all devices splits the batch"
        " (default: one device, or with --distributed all of them). May differ from the"
        " run that --resume continues",
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        default=argparse.SUPPRESS,
        help="this is one of several processes, which jax.distributed finds by the variables of"
        " Slurm, Open MPI, a TPU pod or Kubernetes; JAX_COORDINATOR_ADDRESS=HOST:PORT overrides"
        " who coordinates. DIR must be the same folder for all of them (default: off)",
    )
    for field in dataclasses.fields(Settings):
        _add_setting(parser, field)
    parser.set_defaults(run=_train, parser=parser)


def _folder(name: str) -> pathlib.Path:
    if "\0" in name:
        raise argparse.ArgumentTypeError("a name must not hold a zero byte")
    return pathlib.Path(name)


def _add_setting(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
    # Nothing is stored for an option that was not given: --resume has to know.
    default = "off" if field.default is False else field.default
    shown = "" if default is None else f" (default: {default})"
    parser.add_argument(
        flag(field.name),
        default=argparse.SUPPRESS,
        help=field.metadata["help"] + shown,
        **_KINDS[field.type],
    )


def _train(options: dict) -> int:
    # Here and not above: `--help` and the other commands need no training program.
    from ._training import loop

    folder = options.pop("out", None)
    devices = {
        "expert_parallel": options.pop("expert_parallel", None),
        "distributed": options.pop("distributed", False),
    }
    if "resume" in options:
        resumed = options.pop("resume")
        others = [flag(name) for name in options] + (["--out"] if folder else [])
        if others:
            raise UserError(
                f"--resume takes its settings from the checkpoint: remove {', '.join(others)}"
            )
        return loop.resume(resumed, **devices)
    if options.get("text") == "":
        raise UserError("--text must name a file or folder. Got an empty string.")
    if "text" in options:
        options["text"] = os.path.abspath(options["text"])
    now = datetime.datetime.now(datetime.UTC)
    folder = folder or pathlib.Path("runs", f"{now:%Y%m%d-%H%M%S}")
    return loop.start(Settings(**options), folder, **devices)


def _add_report(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "report",
        allow_abbrev=False,
        help="what the routers of a trained run do with its held-out text",
        description="Run the held-out text of a run through its model and report the load,"
        " balance, confidence and favourite bytes of every expert.",
    )
    parser.add_argument("path", type=_folder, help="the folder of a run, or its checkpoint.eqx")
    parser.add_argument(
        "--out",
        type=_folder,
        metavar="DIR",
        help="folder for report.html and its pictures (default: that of the run)",
    )
    parser.set_defaults(run=_report, parser=parser)


def _report(options: dict) -> int:
    from ._training.run_report import report_run

    return report_run(**options)


def _add_summary(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "summary",
        allow_abbrev=False,
        help="what a checkpoint holds",
        description="Layers, routers, dtypes, bytes and parameters of a safetensors checkpoint,"
        " from the headers of its files.",
    )
    parser.add_argument("path", type=_folder, help="a folder, an index or a .safetensors file")
    parser.add_argument("--layer", type=int, metavar="N", help="only layer N, from 0")
    parser.set_defaults(run=_summary, parser=parser)


def _summary(options: dict) -> int:
    from ._checkpoint import Checkpoint

    try:
        print(Checkpoint(options["path"]).summary(options["layer"]))
    except ValueError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        named = f"cannot read {error.filename}: {error.strerror}"
        raise UserError(named if error.strerror else str(error)) from error
    return 0


def _add_bench(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "bench",
        allow_abbrev=False,
        help="measure the layer against its peers",
        description="Interleaved timings of the experts of a layer against plain matrix products"
        " of equal FLOPs and, where torch and transformers are installed, transformers' experts."
        " Only ratios within one run mean anything.",
    )
    parser.add_argument(
        "--groups",
        nargs="+",
        default=["layers"],
        metavar="GROUP",
        help="of layers, decode, bfloat16, skew, tokens, experts, accelerator (default: layers)",
    )
    parser.add_argument(
        "--directions",
        nargs="+",
        default=list(DIRECTIONS),
        metavar="DIRECTION",
        help=f"of {' and '.join(DIRECTIONS)} (default: both)",
    )
    parser.add_argument(
        "--backends",
        nargs="+",
        default=["auto"],
        metavar="NAME",
        help="the first is ours, the others are peers (default: auto)",
    )
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="samples (default: 7)")
    parser.add_argument("--out", type=_folder, metavar="DIR", help="for bench.json and bench.png")
    parser.set_defaults(run=_bench, parser=parser)


def _bench(options: dict) -> int:
    from ._bench.report import run_and_report

    return run_and_report(**options)


if __name__ == "__main__":
    sys.exit(main())
