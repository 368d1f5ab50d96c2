"""Command line of the lab: ``run`` a program, ``check`` the links, ``cleanup`` abandoned labs."""

from __future__ import annotations

import argparse
import sys

from .check import check_links
from .lab import LabError, NetLab, cleanup
from .link import Link
from .ranks import RankError, run_in_lab

_USAGE = (
    "run: give the command after --, for example: run --hosts 4 --rate 1gbit -- python train.py"
)


def main() -> int:
    """Parse the arguments and run the action."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.netlab", description=__doc__)
    commands = parser.add_subparsers(dest="action", required=True)
    for name, text in (
        ("run", "run a program on every host, once for each rank"),
        ("check", "measure TCP throughput and round trips of the links"),
    ):
        sub = commands.add_parser(name, help=text)
        sub.add_argument("--hosts", type=int, default=4, metavar="N")
        sub.add_argument("--rate", default="1gbit", help="rate of each link, for example 200mbit")
        sub.add_argument("--delay-ms", type=float, default=0.0, help="one-way delay between hosts")
        if name == "run":
            sub.add_argument("--ranks-per-host", type=int, default=1, metavar="G")
            sub.add_argument("command", nargs=argparse.REMAINDER, help="command, after --")
    commands.add_parser("cleanup", help="remove labs whose owner has ended")
    args = parser.parse_args()
    try:
        if args.action == "cleanup":
            removed = cleanup()
            print("\n".join(removed) if removed else "Nothing to clean up.")
            return 0
        link = Link.parse(args.rate, args.delay_ms)
        with NetLab(args.hosts, link, getattr(args, "ranks_per_host", 1)) as lab:
            if args.action == "check":
                print(check_links(lab))
                return 0
            command = args.command[1:] if args.command[:1] == ["--"] else args.command
            if not command:
                parser.error(_USAGE)
            run_in_lab(lab, command)
    except (LabError, RankError, ValueError) as error:
        print(f"netlab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
