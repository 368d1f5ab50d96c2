"""Validated and frozen options of an exchange, the same on all ranks."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from effadam_hook.config.options import DEFAULTS, StateOptions
from effadam_hook.exchange.topology import AUTO, TOPOLOGIES
from effadam_hook.wire.blocks import LARGEST_BLOCK, SMALLEST_BLOCK
from effadam_hook.wire.names import nearest_names
from effadam_hook.wire.quantizers import SCALE_RULES, Quantizer, get_quantizer

__all__ = ["TOPOLOGY_NAMES", "Config"]

TOPOLOGY_NAMES = (*TOPOLOGIES, AUTO)
"""Values of the option ``topology``."""

_MOST_NAMES = 5


@dataclass(frozen=True)
class Config:
    """Options that must be equal on all ranks.

    Attributes:
        worker_quantizer: Name of the quantizer of the uplink.
        server_quantizer: Name of the quantizer of the downlink.
        scale_rule: Rule for the scale of a block, ``"least_squares"`` or ``"absmax"``.
        block_size: Number of elements that share a scale, a multiple of 8 from 16 to 4096; None for the
            rule of :mod:`effadam_hook.wire.blocks`.
        topology: ``"rank0"``, ``"sharded"``, ``"hierarchical"`` or ``"auto"``.
        error_feedback: Whether the error of a quantizer is added to its next input.
        exact: Rules for parameters that are sent uncompressed. ``"1d"`` selects those with at most one
            dimension, ``"<N"`` those with fewer than N elements. All other rules are shell patterns
            for parameter names, such as ``"*.norm*"``. A pattern may match any name of a tied
            parameter, with or without the components that wrappers insert. It must match at least
            one parameter of the model.
        warmup_steps: Number of backward passes with a dense all-reduce before compression starts.
    """

    worker_quantizer: str = DEFAULTS["quantizer"]
    server_quantizer: str = DEFAULTS["quantizer"]
    scale_rule: str = DEFAULTS["scale_rule"]
    block_size: int | None = DEFAULTS["block_size"]
    topology: str = DEFAULTS["topology"]
    error_feedback: bool = DEFAULTS["error_feedback"]
    exact: tuple[str, ...] = tuple(DEFAULTS["exact"])
    warmup_steps: int = DEFAULTS["warmup_steps"]

    @classmethod
    def from_options(cls, options: StateOptions) -> Config:
        """Create the configuration from a user's options.

        Args:
            options: All options of the state.

        Raises:
            ValueError: If the value of an option is invalid.
            TypeError: If an option has the wrong type.
        """
        quantizer, exact = options["quantizer"], options["exact"]
        uplink, downlink = options["worker_quantizer"], options["server_quantizer"]
        return cls(
            worker_quantizer=quantizer if uplink is None else uplink,
            server_quantizer=quantizer if downlink is None else downlink,
            scale_rule=options["scale_rule"],
            block_size=options["block_size"],
            topology=options["topology"],
            error_feedback=options["error_feedback"],
            exact=tuple(exact) if isinstance(exact, list) else exact,
            warmup_steps=options["warmup_steps"],
        )

    def __post_init__(self) -> None:
        get_quantizer(self.worker_quantizer)
        get_quantizer(self.server_quantizer)
        _one_of("scale_rule", self.scale_rule, SCALE_RULES)
        _one_of("topology", self.topology, TOPOLOGY_NAMES)
        if self.block_size is not None:
            _integer("block_size", self.block_size)
            if not SMALLEST_BLOCK <= self.block_size <= LARGEST_BLOCK or self.block_size % 8:
                raise ValueError(
                    f"Invalid block_size: {self.block_size}. Must be a multiple of 8 from "
                    f"{SMALLEST_BLOCK} to {LARGEST_BLOCK}, or None to follow the model's rows."
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
        """Return the quantizer from workers to servers."""
        return get_quantizer(self.worker_quantizer)

    @property
    def downlink(self) -> Quantizer:
        """Return the quantizer from servers to workers."""
        return get_quantizer(self.server_quantizer)

    @property
    def name_patterns(self) -> tuple[str, ...]:
        """Return the rules of ``exact`` that are patterns for parameter names."""
        return tuple(rule for rule in self.exact if rule != "1d" and not rule.startswith("<"))

    def is_exact(self, names: Collection[str], ndim: int, numel: int) -> bool:
        """Return whether a rule of ``exact`` selects a parameter.

        Args:
            names: All names of the parameter; a pattern may match any of them.
            ndim: Number of dimensions of the parameter.
            numel: Number of elements of the parameter.
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
            ValueError: If a pattern matches no name.
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
        """Return plain values, for comparison between ranks and for saved states."""
        return {**asdict(self), "exact": list(self.exact)}


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"Invalid {name}: {value!r}. Must be one of {', '.join(choices)}.")


def _integer(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"Invalid {name}: {value!r}. Must be a whole number.")
