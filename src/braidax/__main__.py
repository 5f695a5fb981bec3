"""The command line: `python -m braidax train`."""

import argparse
import dataclasses
import datetime
import os
import pathlib
import sys
from typing import Any, NoReturn

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
        self.exit(2, f"{self.prog}: error: {message} (try --help)\n")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for a mistake of the user's, 130 or 143."""
    parser = _Parser(prog="python -m braidax", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    _add_train(commands)
    options = vars(parser.parse_args(arguments))
    run = options.pop("run")
    command_parser: _Parser = options.pop("parser")
    del options["command"]
    try:
        return run(options)
    except UserError as error:
        command_parser.error(str(error))
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
        type=pathlib.Path,
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="folder for checkpoint.eqx, metrics.csv, report.json and balance.png"
        " (default: runs/<UTC date and time>)",
    )
    parser.add_argument(
        "--resume",
        type=pathlib.Path,
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="continue the run in DIR exactly where its checkpoint stands; all settings come from"
        " the checkpoint, so no other option is allowed",
    )
    for field in dataclasses.fields(Settings):
        _add_setting(parser, field)
    parser.set_defaults(run=_train, parser=parser)


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
    if "resume" in options:
        resumed = options.pop("resume")
        others = [flag(name) for name in options] + (["--out"] if folder else [])
        if others:
            raise UserError(
                f"--resume takes its settings from the checkpoint: remove {', '.join(others)}"
            )
        return loop.resume(resumed)
    if options.get("text") == "":
        raise UserError("--text must name a file or folder. Got an empty string.")
    if "text" in options:
        options["text"] = os.path.abspath(options["text"])
    now = datetime.datetime.now(datetime.UTC)
    return loop.start(Settings(**options), folder or pathlib.Path("runs", f"{now:%Y%m%d-%H%M%S}"))


if __name__ == "__main__":
    sys.exit(main())
