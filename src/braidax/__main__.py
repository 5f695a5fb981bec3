"""The command line: `python -m braidax train`, `report` and `summary`."""

import argparse
import dataclasses
import datetime
import io
import os
import pathlib
import sys
from typing import Any, NoReturn

import jax

from ._checkpoint import Checkpoint
from ._checks import one_line
from ._memory import keep_memory
from .training import Settings, UserError, report_run, resume, train
from .training.settings import flag

_KINDS: dict[Any, dict[str, Any]] = {
    bool: {"action": "store_true"},
    int: {"type": int, "metavar": "N"},
    float: {"type": float, "metavar": "RATE"},
    str | None: {"type": str, "metavar": "PATH"},
}
_TOO_BIG = (
    "the model or the batch does not fit in memory: lower --batch, --length, --hidden, --layers,"
    " --experts or --intermediate"
)


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any):
        # Nothing is stored for an option that was not given: `train --resume` has to know.
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, **options)

    def error(self, message: str) -> NoReturn:
        """One line and exit code 2, without the usage text that argparse puts before it."""
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for a mistake of the user's, 130 or 143."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A path may hold bytes that are no text; printing it must not end the run.
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    try:
        return options.pop("run")(**options) or 0
    except UserError as error:
        parser.error(str(error))
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        parser.error(_TOO_BIG)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m braidax", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    folder: dict[str, Any] = {"type": _folder, "metavar": "DIR"}

    title = "train a small byte-level language model with mixture-of-experts layers"
    command = commands.add_parser("train", help=title, description=f"{title.capitalize()}.")
    command.epilog = "Ctrl-C or SIGTERM saves a checkpoint and prints the command that continues."
    command.set_defaults(run=_train)
    add = command.add_argument
    add("--out", **folder, help="what to write to (default: runs/<UTC date>)")
    add("--resume", **folder, help="continue the run in DIR exactly, with its settings")
    add(
        "--expert-parallel",
        **_KINDS[int],
        help="spread the experts over N devices; the rest of all devices splits the batch"
        " (default: one device, or with --distributed all of them)",
    )
    add(
        "--distributed",
        **_KINDS[bool],
        help="this is one of several processes, which jax.distributed finds by the variables of"
        " Slurm, Open MPI, a TPU pod or Kubernetes; JAX_COORDINATOR_ADDRESS=HOST:PORT overrides"
        " who coordinates. DIR must be the same folder for all of them (default: off)",
    )
    for field in dataclasses.fields(Settings):
        default = "off" if field.default is False else field.default
        text = field.metadata["help"] + ("" if default is None else f" (default: {default})")
        add(flag(field.name), help=text, **_KINDS[field.type])

    title = "what the routers of a trained run do with its held-out text"
    command = commands.add_parser("report", help=title, description=f"Print {title}.")
    command.set_defaults(run=report_run)
    command.add_argument("path", type=_folder, help="the folder of a run, or its checkpoint.eqx")
    command.add_argument("--out", **folder, help="folder for pictures (default: that of the run)")

    title = "what a safetensors checkpoint holds, from the headers of its files"
    command = commands.add_parser("summary", help=title, description=f"Print {title}.")
    command.set_defaults(run=_summary)
    command.add_argument("path", type=_folder, help="a folder, an index or a .safetensors file")
    command.add_argument("--layer", **_KINDS[int], help="only layer N, from 0")
    return parser


def _folder(name: str) -> pathlib.Path:
    if "\0" in name:
        raise argparse.ArgumentTypeError("a name must not hold a zero byte")
    return pathlib.Path(name)


def _train(**options: Any) -> int:
    kept = keep_memory()  # before the first computation
    code = _trained(**options)
    if kept and jax.process_index() == 0:
        print("freed memory stayed with the process: braidax.keep_memory()")
    return code


def _trained(**options: Any) -> int:
    devices = {n: options.pop(n) for n in ("expert_parallel", "distributed") if n in options}
    if "resume" in options:
        folder = options.pop("resume")
        if options:
            others = ", ".join(map(flag, options))
            raise UserError(f"--resume takes its settings from the checkpoint: remove {others}")
        return resume(folder, **devices)
    if options.get("text") == "":
        raise UserError("--text must name a file or folder. Got an empty string.")
    if "text" in options:
        options["text"] = os.path.abspath(options["text"])
    now = datetime.datetime.now(datetime.UTC)
    folder = options.pop("out", pathlib.Path("runs", f"{now:%Y%m%d-%H%M%S}"))
    return train(Settings(**options), folder, **devices)


def _summary(path: pathlib.Path, layer: int | None = None) -> None:
    try:
        print(Checkpoint(path).summary(layer))
    except ValueError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        named = f"cannot read {error.filename}: {error.strerror}"
        raise UserError(named if error.strerror else str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
