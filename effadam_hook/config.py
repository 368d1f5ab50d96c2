"""The validated, frozen configuration of an exchange, the same on every rank."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from effadam_hook.exchange.topology import AUTO, TOPOLOGIES
from effadam_hook.wire.names import nearest_names
from effadam_hook.wire.quantizers import SCALE_RULES, Quantizer, get_quantizer

__all__ = ["TOPOLOGY_NAMES", "Config"]

TOPOLOGY_NAMES = (*TOPOLOGIES, AUTO)
"""Values of the option ``topology``."""

_MIN_BLOCK, _MAX_BLOCK = 16, 4096
_MOST_NAMES = 5


@dataclass(frozen=True)
class Config:
    """Everything that the ranks must agree on before they exchange anything.

    Attributes:
        worker_quantizer: Name of the uplink's quantizer.
        server_quantizer: Name of the downlink's quantizer.
        scale_rule: ``"least_squares"`` or ``"absmax"``.
        block_size: Elements that share a scale: a power of two from 16 to 4096.
        topology: ``"rank0"``, ``"sharded"`` or ``"auto"``.
        error_feedback: Whether what a quantizer dropped is added to its next input.
        exact: Which parameters travel uncompressed. ``"1d"`` means those with at most one
            dimension, ``"<N"`` those with fewer than N elements, anything else is a shell pattern
            for parameter names, such as ``"*.norm*"``. A pattern may match any name of a tied
            parameter, with or without the components that wrappers insert, and must match at least
            one parameter of the model.
        warmup_steps: Backward passes with a dense all-reduce before compression starts.
    """

    worker_quantizer: str = "lloyd4"
    server_quantizer: str = "lloyd4"
    scale_rule: str = "least_squares"
    block_size: int = 256
    topology: str = "rank0"
    error_feedback: bool = True
    exact: tuple[str, ...] = ("1d",)
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        get_quantizer(self.worker_quantizer)
        get_quantizer(self.server_quantizer)
        _one_of("scale_rule", self.scale_rule, SCALE_RULES)
        _one_of("topology", self.topology, TOPOLOGY_NAMES)
        _integer("block_size", self.block_size)
        if not _MIN_BLOCK <= self.block_size <= _MAX_BLOCK or self.block_size.bit_count() != 1:
            raise ValueError(
                f"Invalid block_size: {self.block_size}. "
                f"Must be a power of two from {_MIN_BLOCK} to {_MAX_BLOCK}."
            )
        _integer("warmup_steps", self.warmup_steps)
        if self.warmup_steps < 0:
            raise ValueError(f"Invalid warmup_steps: {self.warmup_steps}. Must be 0 or more.")
        if not isinstance(self.error_feedback, bool):
            raise TypeError(
                f"Invalid error_feedback: {self.error_feedback!r}. Must be True or False."
            )
        if not isinstance(self.exact, tuple) or not all(isinstance(r, str) for r in self.exact):
            raise TypeError(
                f"Invalid exact: {self.exact!r}. "
                'Must be a tuple of rules such as ("1d", "<1024", "*.norm*").'
            )
        for rule in self.exact:
            if not rule or (rule.startswith("<") and not rule[1:].isdecimal()):
                raise ValueError(
                    f'Invalid rule in exact: {rule!r}. Must be "1d", "<N" with a whole number N, '
                    "or a shell pattern for parameter names."
                )

    @property
    def uplink(self) -> Quantizer:
        """The quantizer from workers to servers."""
        return get_quantizer(self.worker_quantizer)

    @property
    def downlink(self) -> Quantizer:
        """The quantizer from servers to workers."""
        return get_quantizer(self.server_quantizer)

    @property
    def name_patterns(self) -> tuple[str, ...]:
        """The rules of ``exact`` that are patterns for parameter names."""
        return tuple(rule for rule in self.exact if rule != "1d" and not rule.startswith("<"))

    def is_exact(self, names: Collection[str], ndim: int, numel: int) -> bool:
        """Whether a parameter travels uncompressed.

        Args:
            names: All names of the parameter; a pattern may match any of them.
            ndim: Its number of dimensions.
            numel: Its number of elements.

        Returns:
            True if any rule of ``exact`` takes it in.
        """
        return any(
            ndim <= 1
            if rule == "1d"
            else numel < int(rule[1:])
            if rule.startswith("<")
            else any(fnmatchcase(name, rule) for name in names)
            for rule in self.exact
        )

    def check_patterns(self, names: Collection[str]) -> None:
        """Check that every pattern of ``exact`` matches a parameter of the model.

        Args:
            names: All names of the model's parameters.

        Raises:
            ValueError: If a pattern matches none of them.
        """
        for rule in self.name_patterns:
            if any(fnmatchcase(name, rule) for name in names):
                continue
            near = nearest_names(rule, names)
            shown = near or list(dict.fromkeys(names))[:_MOST_NAMES]
            raise ValueError(
                f"Invalid rule in exact: {rule!r}, which matches no parameter of the model. Must match "
                f"at least one; the {'nearest names' if near else 'first names of the model'} are "
                f"{', '.join(map(repr, shown))}. Correct the pattern, or leave it out."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for comparison between ranks and for saved states."""
        return {**asdict(self), "exact": list(self.exact)}


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"Invalid {name}: {value!r}. Must be one of {', '.join(choices)}.")


def _integer(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"Invalid {name}: {value!r}. Must be a whole number.")
