"""Draws seeds, runs their cases, judges what the ranks saw, and keeps the tally.

python -m fuzz.campaign --minutes 5 --seed 1 --table ../docs/reliability.md
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fuzz.books import missing
from fuzz.cases import ENDINGS, LOSSES, NODES, Case, Ending, draw
from fuzz.ranks import Report, lose_a_rank, run_batch
from harness import Died, run_ranks

__all__ = ["Tally", "run"]

_BATCH = 25
_MARKS = ("<!-- fuzz:begin -->", "<!-- fuzz:end -->")
_SOON_S = 15.0
_QUIET = {"TORCH_CPP_LOG_LEVEL": "FATAL"}


@dataclass
class Tally:
    """Faults that were injected, and their outcome.

    Attributes:
        runs: Fuzzed runs.
        injected: By kind of fault, how often.
        wrong: What should not have happened, with seeds.
        seconds: How long the campaign took.
    """

    runs: int = 0
    injected: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def note(self, kind: str, case: str, text: str) -> None:
        """Record a failure of one of the ``kind`` hang, divergence, poison, loss or silence."""
        self.kinds[kind] += 1
        self.wrong.append(f"{kind}: {case}: {text}")
        print(self.wrong[-1], flush=True)


def run(seed: int, *, minutes: float = 0.0, batches: int = 0, batch: int = _BATCH) -> Tally:
    """Run a campaign.

    Args:
        seed: The first seed; cases get this one and the following.
        minutes: How long; used if ``batches`` is 0.
        batches: How many sets of processes.
        batch: Cases in each.

    Returns:
        The tally.
    """
    tally = Tally()
    began = time.monotonic()
    chance = random.Random(seed)
    number = 0
    print(f"fuzz: first seed {seed}", flush=True)
    while number < batches if batches else time.monotonic() - began < 60 * minutes:
        nodes, local = chance.choice(NODES) if number % 2 else (0, 0)
        world_size = nodes * local or chance.choice([1, 2, 2, 3, 3, 4])
        seeds = [seed + number * _BATCH + i for i in range(batch)]
        _run_batch(tally, _plan(chance, seeds, world_size, number), world_size, nodes)
        if number % 4 == 2:
            _lose_a_rank(tally, seed + number, chance.choice(LOSSES), 2 * (number // 4 % 2))
        number += 1
        if number % 10 == 0:
            print(f"fuzz: {tally.runs} runs, {len(tally.wrong)} wrong", flush=True)
    tally.seconds = time.monotonic() - began
    return tally


def _plan(
    chance: random.Random, seeds: list[int], world_size: int, number: int
) -> list[tuple[int, str]]:
    """Seeds with endings: every eighth case has one, and the last of every third set of processes one
    that leaves the process group unusable."""
    if world_size == 1:
        return [(seed, "") for seed in seeds]
    lasting = [ending for ending in ENDINGS.values() if ending.leaves_group]
    fatal = [ending for ending in ENDINGS.values() if not ending.leaves_group]

    def drawn(endings: list[Ending]) -> str:
        return chance.choices(endings, [ending.weight for ending in endings])[0].name

    plan = [(seed, drawn(lasting) if seed % 8 == 7 else "") for seed in seeds]
    if number % 3 == 1:
        plan[-1] = (seeds[-1], drawn(fatal))
    return plan


def _run_batch(tally: Tally, plan: list[tuple[int, str]], world_size: int, nodes: int) -> None:
    ranks = f"{nodes} nodes x {world_size // nodes} ranks" if nodes else f"{world_size} ranks"
    name = f"{ranks}, seeds {plan[0][0]} to {plan[-1][0]}"
    try:
        by_rank = run_ranks(run_batch, world_size, plan, nodes, timeout=240, env=_QUIET)
    except TimeoutError as error:
        tally.note("hang", name, str(error))
        return
    except RuntimeError as error:
        tally.note("crash", name, str(error)[:6000])
        return
    for (seed, ending), reports in zip(plan, zip(*by_rank, strict=False), strict=False):
        case = draw(seed, world_size, ending, nodes)
        tally.runs += 1
        _count(tally, case)
        _judge(tally, case, f"seed {seed} on {ranks}", list(reports))
    done = min(len(reports) for reports in by_rank)
    if done < len(plan) and not by_rank[0][-1].error:
        tally.note("silence", name, f"only {done} of {len(plan)} cases were run")


def _count(tally: Tally, case: Case) -> None:
    counts = {
        "non-finite gradients": len(case.poisoned),
        "gradients whose sums overflow": case.is_huge,
        "parameters unused by some rank": sum(map(bool, case.unused.values())),
        "parameters unused by some rank, in update mode": case.updates
        and sum(map(bool, case.unused.values())),
        "compression switched on all ranks": len(case.switched),
        "join() with uneven batches": len(set(case.batches)) > 1,
        "loss scale changed by GradScaler": case.scales,
        "topology hierarchical": bool(case.nodes),
        "topology hierarchical, in update mode": bool(case.nodes) and case.updates,
        "DDP model copied": case.copied >= 0,
        "phases delayed at random": case.jitter,
    }
    if case.ending:
        counts[case.ending.name] = 1
    elif case.resumed >= 0:
        counts[case.rebuild] = 1
    for kind, count in counts.items():
        tally.injected[kind] += count


def _judge(tally: Tally, case: Case, name: str, reports: list[Report]) -> None:
    if any(not report.is_finite for report in reports):
        tally.note("poison", name, "a residual is not finite")
    if case.ending:
        if case.options["worker_quantizer"] == "none" and case.ending.name.startswith("weights"):
            return
        for rank, report in enumerate(reports):
            told = "Rank " in report.error or not (
                case.ending.culprit_is_told or rank != case.culprit
            )
            if not report.error:
                tally.note("silence", name, f"{case.ending.name}: rank {rank} was not told")
            elif not told or report.seconds > _SOON_S:
                text = f"{case.ending.name}: rank {rank}: {report.seconds:.0f} s: {report.error}"
                tally.note("silence", name, text)
        return
    for rank, report in enumerate(reports):
        if report.error:
            tally.note("crash", name, f"{_kinds(case)}: rank {rank}: {report.error}")
            return
        if report.overflows and case.dtype != torch.float16:
            tally.note("poison", name, f"finite gradients are not at steps {report.overflows}")
        pairs = zip(report.digests, reports[0].digests, strict=False)
        same = all(
            torch.equal(a, b) for a, b in zip(report.weights, reports[0].weights, strict=True)
        )
        if any(a != b for a, b in pairs) or not (same or case.is_alone(case.steps - 1)):
            tally.note("divergence", name, f"{_kinds(case)}: rank {rank} is not the same as rank 0")
    for text in missing(case, reports):
        tally.note("loss", name, f"{_kinds(case)}: {text}")


def _kinds(case: Case) -> str:
    """List the special properties of a case."""
    kinds = {
        "unused": case.unused,
        case.rebuild: case.resumed >= 0,
        "join": case.batches,
        "scaler": case.scales,
        "copied": case.copied >= 0,
        "huge": case.is_huge,
        "switched": case.switched,
        "zeros": not case.set_to_none,
    }
    return ", ".join([case.mode, *(kind for kind, is_drawn in kinds.items() if is_drawn)])


def _lose_a_rank(tally: Tally, seed: int, kind: str, nodes: int) -> None:
    world_size = 4 if nodes else 3
    name = f"{kind}, seed {seed} on {world_size} ranks of {nodes or 'any'} nodes"
    tally.injected[kind] += 1
    tally.runs += 1
    with tempfile.TemporaryDirectory() as folder:
        try:
            results = run_ranks(
                lose_a_rank,
                world_size,
                *(folder, seed, kind, nodes),
                backend=None,
                may_die=tuple(range(world_size)),
                timeout=60,
                grace=30,
                env=_QUIET,
            )
        except (TimeoutError, RuntimeError) as error:
            tally.note("hang", name, str(error)[:3000])
            return
    survivors = [result for result in results if not isinstance(result, Died)]
    if len(survivors) != world_size - 1:
        tally.note("crash", name, f"{len(survivors)} survivors")
    for report in survivors:
        told = "Rank " in report.error and report.seconds <= _SOON_S
        if not told or not report.is_finite:
            text = f"{report.seconds:.0f} s, finite {report.is_finite}: {report.error}"
            tally.note("silence", name, text)


def table(tally: Tally, seed: int) -> str:
    """The tally for people, in Markdown.

    Args:
        tally: Of a campaign.
        seed: Its first seed.
    """
    kinds = ("hang", "divergence", "poison", "loss", "silence", "crash")
    lines = [
        f"{tally.runs} fuzzed runs on 1 to 6 ranks in {tally.seconds / 60:.0f} minutes, first seed "
        f"{seed}, torch {torch.__version__}, Python {sys.version.split()[0]}.",
        "",
        "| injected | times |",
        "|---|---:|",
        *(f"| {kind} | {count} |" for kind, count in sorted(tally.injected.items())),
        "",
        "| outcome that must not be | times |",
        "|---|---:|",
        *(f"| {kind} | {tally.kinds[kind]} |" for kind in kinds),
    ]
    return "\n".join(lines)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 10**6)
    parser.add_argument("--table", type=Path, help="a document in which to renew the table")
    arguments = parser.parse_args()
    tally = run(arguments.seed, minutes=arguments.minutes)
    text = table(tally, arguments.seed)
    print(text)
    if arguments.table is not None:
        document = arguments.table.read_text()
        before, _, rest = document.partition(_MARKS[0])
        _, _, after = rest.partition(_MARKS[1])
        arguments.table.write_text(f"{before}{_MARKS[0]}\n{text}\n{_MARKS[1]}{after}")
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
