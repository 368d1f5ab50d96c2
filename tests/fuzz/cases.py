"""A fuzzed run: everything is drawn from one seed, the same on every rank."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from effadam_hook.wire.quantizers import QUANTIZERS

__all__ = [
    "ENDINGS",
    "LOSSES",
    "NODES",
    "REBUILDS",
    "WRAPPERS",
    "Case",
    "Ending",
    "Model",
    "draw",
    "gradients",
]

NODES = ((2, 2), (2, 2), (3, 2), (2, 3))
"""Numbers of nodes, and of ranks of a node, of the hierarchical topology."""

DTYPES = (torch.float32, torch.float64, torch.float64, torch.bfloat16, torch.float16)
PRECISE = (torch.float32, torch.float64)
HUGE = 3e37


@dataclass(frozen=True)
class Ending:
    """A fault after which training must be over on every rank, in seconds and with the reason.

    Attributes:
        name: In words.
        weight: How often it is drawn, relative to the others.
        at_start: Whether it happens in the first step, and not in the last but one.
        leaves_group: Whether the process group is usable afterwards; otherwise it is the last of its
            processes.
        culprit_is_told: Whether the rank where it happens gets the reason too, in the package's words.
    """

    name: str
    weight: int = 2
    at_start: bool = False
    leaves_group: bool = True
    culprit_is_told: bool = True


_ENDINGS = (
    Ending("exception in encode"),
    Ending("exception in reduce"),
    Ending("exception in decode"),
    Ending("exception in planning", at_start=True),
    Ending("exception in the choice of kernels", at_start=True),
    Ending("exception in the check of accumulation"),
    Ending("weights changed on one rank"),
    Ending("another state loaded on one rank"),
    Ending("models used in another order on one rank", weight=1, leaves_group=False),
    Ending("enabled switched on one rank", leaves_group=False),
    Ending("a barrier on one rank alone", weight=1, leaves_group=False, culprit_is_told=False),
)
ENDINGS = {ending.name: ending for ending in _ENDINGS}

LOSSES = ("rank killed", "rank stopped", "rank exits before its first backward")
"""Ways in which a rank is lost, each in a run of its own."""

REBUILDS = (
    "resumed from each rank's own file",
    "resumed from a full state",
    "resumed with parameters in another order",
    "resumed under another wrapper",
    "resumed on more ranks",
)
"""Ways in which model and state are rebuilt in the middle of a run."""

WRAPPERS = ("", "_orig_mod", "_checkpoint_wrapped_module")
"""Attributes under which wrappers hold a module: those of torch.compile and of checkpointing."""


@dataclass(frozen=True)
class Case:
    """One fuzzed run.

    Attributes:
        seed: From which all else is drawn.
        shapes: The parameters.
        dtype: Of all of them.
        mode: ``"gradient"``, ``"preconditioned"``, ``"update"`` or ``"weights"`` (of Quantized Adam).
        options: Those of the state.
        ddp_options: Those of DDP.
        optimizer_options: Those of an ``EfficientAdam``.
        steps: How many steps are made.
        ending: The fault that ends it, if any.
        unused: By step and rank, the parameters that the forward does not use.
        poisoned: By step, a rank, a parameter and what it gets as a gradient.
        switched: Steps before which compression is switched on all ranks.
        resumed: The step before which model and state are built anew and loaded; -1 for none.
        rebuild: How: one of :data:`REBUILDS`.
        copied: The step before which the DDP model is copied, and the copy used; -1 for none.
        batches: With ``join()``, how many steps each rank has data for; empty without.
        scales: Whether a ``GradScaler`` multiplies the loss.
        is_huge: Whether gradients are near the end of float32, so that sums with residuals overflow.
        set_to_none: Whether ``zero_grad()`` removes gradients, or fills them with zeros.
        jitter: Whether every phase is delayed by random times.
        culprit: The rank where the ending happens.
        part_numel: Elements of the parts into which buckets are cut.
        nodes: In the hierarchical topology the node of each rank; empty in flat ones.
    """

    seed: int
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    mode: str
    options: dict[str, Any]
    ddp_options: dict[str, Any]
    optimizer_options: dict[str, Any]
    steps: int
    ending: Ending | None = None
    unused: dict[tuple[int, int], frozenset[int]] = field(default_factory=dict)
    poisoned: dict[int, tuple[int, int, float]] = field(default_factory=dict)
    switched: frozenset[int] = frozenset()
    resumed: int = -1
    rebuild: str = REBUILDS[0]
    copied: int = -1
    batches: tuple[int, ...] = ()
    scales: bool = False
    is_huge: bool = False
    set_to_none: bool = True
    jitter: bool = False
    culprit: int = 0
    part_numel: int = 1 << 19
    nodes: tuple[int, ...] = ()

    def workers(self, world_size: int) -> list[list[int]]:
        """Return the ranks of each worker of the algorithm."""
        names = self.nodes or range(world_size)
        return [[r for r, n in enumerate(names) if n == name] for name in sorted(set(names))]

    @property
    def updates(self) -> bool:
        """Return whether Adam updates are exchanged."""
        return self.mode in ("update", "weights")

    def is_alone(self, step: int) -> bool:
        """Return whether every rank trains alone at a step, with the data of rank 0."""
        return step < self.resumed and self.rebuild == "resumed on more ranks"

    def uses(self, step: int, rank: int, parameter: int) -> bool:
        """Return whether a rank's forward uses a parameter."""
        return parameter not in self.unused.get((step, 0 if self.is_alone(step) else rank), ())


class Model(nn.Module):
    """Parameters whose gradients the caller chooses; None for one that is not used.

    Args:
        shapes: One each.
        dtype: Of all.
        order: In which they are registered. Their names do not depend on it.
        wrapper: One of :data:`WRAPPERS`.
    """

    def __init__(
        self,
        shapes: tuple[tuple[int, ...], ...],
        dtype: torch.dtype,
        order: tuple[int, ...] = (),
        wrapper: str = "",
    ) -> None:
        super().__init__()
        inner = nn.Module() if wrapper else self
        if wrapper:
            self.add_module(wrapper, inner)
        inner.weights = nn.ParameterDict(
            {
                str(p): nn.Parameter(torch.zeros(shapes[p], dtype=dtype))
                for p in order or range(len(shapes))
            }
        )
        self.ordered = [inner.weights[str(p)] for p in range(len(shapes))]

    def forward(self, chosen: list[Tensor | None]) -> Tensor:
        pairs = zip(self.ordered, chosen, strict=True)
        terms = [(w * g).sum() for w, g in pairs if g is not None]
        return torch.stack(terms).sum()


def draw(seed: int, world_size: int, ending: str = "", nodes: int = 0) -> Case:
    """A case.

    Args:
        seed: Any number.
        world_size: On how many ranks it runs.
        ending: The fault that is to end it, one of :data:`ENDINGS`; ``"lost"`` for a rank that is lost.
        nodes: Number of nodes in the hierarchical topology; 0 for a flat one.
    """
    chance = random.Random(seed)
    shapes = tuple(_shape(chance) for _ in range(chance.randint(1, 7)))
    modes = ["gradient"] * 4 + ["preconditioned"] + ["update"] * 2 + ["weights"]
    if nodes:
        modes = [mode for mode in modes if mode != "weights"]
    mode = "gradient" if ending else chance.choice(modes)
    dtypes = {"gradient": DTYPES, "preconditioned": PRECISE[:1]}.get(mode, PRECISE)
    dtype = chance.choice(dtypes)
    steps = chance.randint(4 if ending else 3, 7)
    names = list(QUANTIZERS)
    options = {
        "worker_quantizer": chance.choice(names),
        "server_quantizer": chance.choice(names),
        "block_size": 2 ** chance.randint(4, 10),
        "topology": chance.choice(
            ["hierarchical", "auto"] if nodes else ["rank0", "sharded", "auto"]
        ),
        "error_feedback": chance.random() < 0.9,
        "exact": chance.choice([("1d",), (), ("<40",), ("weights.0",)]),
        "scale_rule": chance.choice(["least_squares", "least_squares", "absmax"]),
        "warmup_steps": 0 if ending else chance.choice([0, 0, 0, 1, 2]),
    }
    ddp_options: dict[str, Any] = {
        "bucket_cap_mb": chance.choice([0.0005, 0.002, 0.01, 25]),
        "gradient_as_bucket_view": chance.random() < 0.3,
    }
    kinds: dict[str, Any] = {}
    if ending:
        kinds["ending"] = ENDINGS.get(ending)
        if ending.startswith("another state"):
            kinds["resumed"] = steps - 2
    else:
        kinds = _draw_kinds(chance, mode, dtype, len(shapes), steps, world_size)
        if kinds.pop("static_graph"):
            # Not with an ending: DDP rebuilds its buckets in the third forward then, and waits there
            # for a rank that has failed in the second backward until that rank's process ends.
            ddp_options["static_graph"] = True
        if kinds.get("unused"):
            ddp_options["find_unused_parameters"] = True
    return Case(
        seed,
        shapes,
        dtype,
        mode,
        options,
        ddp_options,
        {
            "lr": 1e-3,
            "second_moment": chance.choice(["local", "local", "shared"]),
            "refresh_every": 3,
        },
        steps,
        jitter=chance.random() < 0.3,
        # In topology "rank0" only rank 0 reduces.
        culprit=0 if "reduce" in ending else chance.randrange(world_size),
        part_numel=chance.choice([100, 1000, 1 << 19]),
        nodes=_draw_nodes(chance, world_size, nodes),
        **kinds,
    )


def _draw_nodes(chance: random.Random, world_size: int, nodes: int) -> tuple[int, ...]:
    """Draw the node of each rank: in order, dealt in turn, or in any order."""
    if not nodes:
        return ()
    drawn = [rank * nodes // world_size for rank in range(world_size)]
    order = chance.randrange(3)
    if order == 1:
        drawn = [rank % nodes for rank in range(world_size)]
    elif order == 2:
        chance.shuffle(drawn)
    return tuple(drawn)


def _draw_kinds(
    chance: random.Random,
    mode: str,
    dtype: torch.dtype,
    parameters: int,
    steps: int,
    world_size: int,
) -> dict[str, Any]:
    """Draw the events of a run that reaches its end; ``static_graph`` is DDP's."""
    gradient = mode == "gradient"
    kinds: dict[str, Any] = {
        "static_graph": False,
        "set_to_none": chance.random() < 0.7,
        "is_huge": gradient and dtype != torch.float16 and chance.random() < 0.08,
    }
    if gradient and not kinds["is_huge"] and dtype in PRECISE:
        kinds["scales"] = chance.random() < 0.25
    if mode != "preconditioned" and chance.random() < 0.12:
        kinds["batches"] = tuple(chance.randint(1, steps) for _ in range(world_size))
        kinds["scales"] = False  # a rank out of data does not learn of another loss scale
        return kinds
    if mode != "preconditioned" and parameters > 1 and chance.random() < 0.35:
        kinds["unused"] = _draw_unused(chance, parameters, steps, world_size)
    elif chance.random() < 0.15:
        kinds["static_graph"] = True
    if mode in ("gradient", "preconditioned") and chance.random() < 0.4:
        values = [float("nan"), float("inf"), -float("inf")]
        kinds["poisoned"] = {
            step: (
                chance.randrange(world_size),
                chance.randrange(parameters),
                chance.choice(values),
            )
            for step in range(steps)
            if chance.random() < 0.3
        }
    if mode in ("gradient", "update") and chance.random() < 0.3:
        kinds["switched"] = frozenset(s for s in range(1, steps) if chance.random() < 0.5)
    if chance.random() < 0.25:
        kinds["resumed"] = chance.randint(1, steps - 1)
        # The optimizer of torch goes by positions.
        kinds["rebuild"] = chance.choice(REBUILDS[:2] if mode == "preconditioned" else REBUILDS)
    elif gradient and not kinds["static_graph"] and chance.random() < 0.15:
        kinds["copied"] = chance.randint(1, steps - 1)
    return kinds


def _draw_unused(
    chance: random.Random, parameters: int, steps: int, world_size: int
) -> dict[tuple[int, int], frozenset[int]]:
    """By step and rank; at least one parameter is used, in half of the cases the same on all ranks."""
    alike = chance.random() < 0.5
    unused: dict[tuple[int, int], frozenset[int]] = {}
    for step in range(steps):
        for rank in range(world_size):
            some = {p for p in range(parameters) if chance.random() < 0.3}
            some.discard(chance.randrange(parameters))
            unused[step, rank] = unused[step, 0] if alike and rank else frozenset(some)
    return unused


def gradients(case: Case, rank: int, step: int) -> list[Tensor | None]:
    """Draw the gradients of a rank at a step.

    Args:
        case: The run.
        rank: Which rank.
        step: Which step.
    """
    if case.is_alone(step):
        rank = 0
    generator = torch.Generator().manual_seed((case.seed * 31 + step) * 97 + rank)
    chance = random.Random(case.seed * 1009 + step)
    chosen: list[Tensor | None] = []
    for p, shape in enumerate(case.shapes):
        size = 10.0 ** chance.uniform(-4, 1)
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        value = value.clamp(-5, 5) * HUGE if case.is_huge else value * size
        chosen.append(value.to(case.dtype) if case.uses(step, rank, p) else None)
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
