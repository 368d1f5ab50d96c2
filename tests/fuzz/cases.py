"""What a fuzzed run consists of: everything is drawn from one seed, the same on every rank."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effadam_hook.quantizers import QUANTIZERS

__all__ = ["ENDINGS", "Case", "Model", "draw", "gradients"]

DTYPES = (torch.float32, torch.float64, torch.float64, torch.bfloat16, torch.float16)
ENDINGS = (
    "exception in encode",
    "exception in reduce",
    "exception in decode",
    "weights changed on one rank",
    "enabled switched on one rank",
)
"""Faults after which training must be over on every rank, in seconds and with the reason."""


@dataclass(frozen=True)
class Case:
    """One fuzzed run.

    Attributes:
        seed: From which all else is drawn.
        shapes: The parameters.
        dtype: Of all of them.
        mode: ``"gradient"``, ``"preconditioned"`` or ``"update"``.
        options: Those of the state.
        ddp_options: Those of DDP.
        steps: How many steps are made.
        unused: By step and rank, the parameters that the forward does not use.
        poisoned: By step, a rank, a parameter and what it gets as a gradient.
        switched: Steps before which compression is switched on all ranks.
        resumed: The step before which model and state are built anew and loaded; -1 for none.
        jitter: Whether every phase is delayed by random times.
        ending: The fault that ends it, if any, at the last step but one.
        culprit: The rank where the ending happens.
        part_numel: Elements of the parts into which buckets are cut.
    """

    seed: int
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    mode: str
    options: dict[str, Any]
    ddp_options: dict[str, Any]
    steps: int
    unused: dict[tuple[int, int], frozenset[int]]
    poisoned: dict[int, tuple[int, int, float]]
    switched: frozenset[int]
    resumed: int
    jitter: bool
    ending: str
    culprit: int
    part_numel: int


class Model(nn.Module):
    """Parameters whose gradients the caller chooses; None for one that is not used."""

    def __init__(self, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(s, dtype=dtype)) for s in shapes)

    def forward(self, chosen: list[Tensor | None]) -> Tensor:
        pairs = zip(self.weights, chosen, strict=True)
        terms = [(w * g).sum() for w, g in pairs if g is not None]
        return torch.stack(terms).sum()


def draw(seed: int, world_size: int, ending: str = "") -> Case:
    """A case.

    Args:
        seed: Any number.
        world_size: On how many ranks it runs.
        ending: The fault that is to end it.
    """
    chance = random.Random(seed)
    shapes = tuple(_shape(chance) for _ in range(chance.randint(1, 7)))
    mode = "gradient" if ending else chance.choice(["gradient"] * 3 + ["preconditioned", "update"])
    dtype = torch.float32 if mode != "gradient" else chance.choice(DTYPES)
    names = list(QUANTIZERS)
    options = {
        "worker_quantizer": chance.choice(names),
        "server_quantizer": chance.choice(names),
        "block_size": 2 ** chance.randint(4, 10),
        "topology": chance.choice(["rank0", "sharded"]),
        "error_feedback": chance.random() < 0.9,
        "exact": chance.choice([("1d",), (), ("<40",), ("weights.0",)]),
        "scale_rule": chance.choice(["least_squares", "least_squares", "absmax"]),
        "warmup_steps": 0 if ending else chance.choice([0, 0, 0, 1, 2]),
    }
    steps = chance.randint(3, 7)
    ddp_options: dict[str, Any] = {
        "bucket_cap_mb": chance.choice([0.0005, 0.002, 0.01, 25]),
        "gradient_as_bucket_view": chance.random() < 0.3,
    }
    unused: dict[tuple[int, int], frozenset[int]] = {}
    if not ending and mode == "gradient" and len(shapes) > 1 and chance.random() < 0.3:
        ddp_options["find_unused_parameters"] = True
        for step in range(steps):
            for rank in range(world_size):
                some = {p for p in range(len(shapes)) if chance.random() < 0.3}
                some.discard(chance.randrange(len(shapes)))
                unused[step, rank] = frozenset(some)
    elif chance.random() < 0.15 and not ending:
        # DDP rebuilds its buckets in the third forward then, and waits there for a rank that has failed
        # in the second backward until that rank's process ends, as these do not.
        ddp_options["static_graph"] = True
    poisoned = {}
    if mode != "update" and chance.random() < 0.4:
        for step in range(steps):
            if chance.random() < 0.3:
                value = chance.choice([float("nan"), float("inf"), -float("inf")])
                poisoned[step] = (
                    chance.randrange(world_size),
                    chance.randrange(len(shapes)),
                    value,
                )
    switching = not ending and mode == "gradient" and chance.random() < 0.3
    switched = frozenset(s for s in range(1, steps) if switching and chance.random() < 0.5)
    resumed = chance.randint(1, steps - 1) if not ending and chance.random() < 0.2 else -1
    return Case(
        seed,
        shapes,
        dtype,
        mode,
        options,
        ddp_options,
        steps,
        unused,
        poisoned,
        switched,
        resumed,
        chance.random() < 0.3,
        ending,
        # In topology "rank0" only rank 0 reduces.
        0 if "reduce" in ending else chance.randrange(world_size),
        chance.choice([100, 1000, 1 << 19]),
    )


def gradients(case: Case, rank: int, step: int) -> list[Tensor | None]:
    """What a rank's backward yields at a step.

    Args:
        case: The run.
        rank: Which rank.
        step: Which step.
    """
    generator = torch.Generator().manual_seed((case.seed * 31 + step) * 97 + rank)
    chance = random.Random(case.seed * 1009 + step)
    chosen: list[Tensor | None] = []
    for p, shape in enumerate(case.shapes):
        size = 10.0 ** chance.uniform(-4, 1)
        value = torch.randn(shape, generator=generator, dtype=torch.float64) * size
        value = value.to(case.dtype)
        chosen.append(None if p in case.unused.get((step, rank), ()) else value)
    if step in case.poisoned:
        culprit, p, bad = case.poisoned[step]
        target = chosen[p]
        if rank == culprit and target is not None and target.numel():
            target.view(-1)[chance.randrange(target.numel())] = bad
    return chosen


def _shape(chance: random.Random) -> tuple[int, ...]:
    dimensions = chance.choice([1, 2, 2, 2, 3])
    longest = {1: 600, 2: 60, 3: 14}[dimensions]
    return tuple(chance.randint(1, longest) for _ in range(dimensions))
