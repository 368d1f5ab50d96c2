"""The command line: subcommands, exit codes and error output."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import NoReturn

import torch.distributed as dist

import effadam_hook
from effadam_hook.cli.bench import add_bench, run_bench
from effadam_hook.cli.env import add_env, run_env
from effadam_hook.cli.kernel_check import KernelsError
from effadam_hook.cli.plan import add_plan, run_plan
from effadam_hook.cli.report import add_report, run_report
from effadam_hook.cli.ui import printable
from effadam_hook.errors import CommandError, EffAdamError, UserCodeError

__all__ = ["main"]

_ABOUT = (
    "Communication-efficient data-parallel training: environment, prediction, comparison, logs."
)
_INTERRUPTED = 130

_Parts = tuple[
    str, str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]
]
_COMMANDS: tuple[_Parts, ...] = (
    ("env", "show installed versions and the kernels that will run", add_env, run_env),
    (
        "plan",
        "measure the link, predict step times, recommend a method",
        add_plan,
        run_plan,
    ),
    (
        "bench",
        "train with several methods and compare step times",
        add_bench,
        run_bench,
    ),
    ("report", "show a run's log as a table and a figure", add_report, run_report),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None takes those of the process.

    Returns:
        The exit code: 0; 1 after an error at run time; 2 after a usage error, which includes files that
        cannot be read or written; 130 after Ctrl-C.
    """
    parser, commands = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        commands[args.command].error(_unknown(unknown, commands[args.command]))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for characters that its encoding lacks
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # the reader has closed the pipe
        _abandon_output()
        return 1
    except Exception as error:
        code, lines = _explain(error)
        if isinstance(error, OSError):
            _abandon_output()
        sys.stderr.write(
            printable("".join([*lines[:-1], f"effadam {args.command}: {lines[-1]}\n"]))
        )
    return code


def build_parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """Make the parser of the command line.

    Returns:
        The parser, and that of every subcommand by name.
    """
    parser = _Parser(prog="effadam", description=_ABOUT)
    parser.add_argument("--version", action="version", version=effadam_hook.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text, add, run in _COMMANDS:
        sub = commands.add_parser(name, help=text, description=text)
        add(sub)
        sub.set_defaults(run=run)
    return parser, commands.choices


def _unknown(words: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """Return the message for words that no option takes, with the nearest option."""
    names = [name for action in parser._actions for name in action.option_strings]
    near = get_close_matches(words[0].partition("=")[0], names, n=1)
    hint = f". Did you mean {near[0]}?" if near else ""
    return f"unrecognized arguments: {' '.join(words)}{hint}"


class _Parser(argparse.ArgumentParser):
    """Parser that escapes control characters in its messages."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def _explain(error: Exception) -> tuple[int, list[str]]:
    """Select the exit code for an error, and the lines to print.

    Args:
        error: The exception that ended a command.

    Returns:
        The exit code, and lines of which the last describes the error.

    Raises:
        Exception: The error itself, if it is an internal error.
    """
    if isinstance(error, UserCodeError):
        return 1, [*traceback.format_exception(error.__cause__), str(error)]
    if isinstance(error, EffAdamError | KernelsError):
        return 1, [str(error)]
    if isinstance(error, dist.DistError):
        return 1, [
            f"the ranks do not reach one another: {error}. MASTER_ADDR and MASTER_PORT must be those "
            "of rank 0 and reachable from every host. GLOO_SOCKET_IFNAME, if set, must name the "
            "interface between the hosts."
        ]
    if isinstance(error, MemoryError):
        return 1, ["out of memory. Use a smaller file or model, or a machine with more memory."]
    if isinstance(error, CommandError | ValueError | OSError):
        return 2, [" ".join(str(error).split("\n"))]
    raise error


def _abandon_output() -> None:
    """Discard buffered output after a failed write, so that the interpreter does not write it again."""
    if sys.stdout is sys.__stdout__ and sys.stdout is not None:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
