"""The command line: subcommands, exit codes and error output."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence

import torch.distributed as dist

import effadam_hook
from effadam_hook.cli.bench import add_bench, run_bench
from effadam_hook.cli.env import add_env, run_env
from effadam_hook.cli.kernel_check import KernelsError
from effadam_hook.cli.plan import add_plan, run_plan
from effadam_hook.cli.report import add_report, run_report
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
        The exit code: 0, 1 if something went wrong while it ran, 2 if it could not be asked like this,
        130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="effadam", description=_ABOUT)
    parser.add_argument("--version", action="version", version=effadam_hook.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text, add, run in _COMMANDS:
        sub = commands.add_parser(name, help=text, description=text)
        add(sub)
        sub.set_defaults(run=run)
    args = parser.parse_args(argv)
    try:
        code: int = args.run(args)
    except (CommandError, ValueError) as error:
        sys.stderr.write(f"effadam {args.command}: {error}\n")
        return 2
    except UserCodeError as error:
        traceback.print_exception(error.__cause__, file=sys.stderr)
        sys.stderr.write(f"effadam {args.command}: {error}\n")
        return 1
    except (EffAdamError, KernelsError) as error:
        sys.stderr.write(f"effadam {args.command}: {error}\n")
        return 1
    except dist.DistError as error:
        sys.stderr.write(
            f"effadam {args.command}: the ranks do not reach one another: {error}. MASTER_ADDR and "
            "MASTER_PORT must be those of rank 0, reachable from every host, and GLOO_SOCKET_IFNAME, "
            "if set, the interface between them.\n"
        )
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
    return code
