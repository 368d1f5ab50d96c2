"""The validated, frozen configuration of an exchange, the same on every rank."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from effadam_hook.quantizers import SCALE_RULES, Quantizer, get_quantizer

__all__ = ["TOPOLOGIES", "Config"]

TOPOLOGIES = ("rank0", "sharded", "auto")
"""Who is the server: rank 0 for everything, every rank for its share of every parameter, or whichever
is faster on this link."""

_MIN_BLOCK, _MAX_BLOCK = 16, 4096


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
            for parameter names, such as ``"*.norm*"``.
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
        _one_of("topology", self.topology, TOPOLOGIES)
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

    def needs_names(self) -> bool:
        """Whether a rule in ``exact`` asks for parameter names."""
        return any(rule != "1d" and not rule.startswith("<") for rule in self.exact)

    def is_exact(self, name: str, ndim: int, numel: int) -> bool:
        """Whether a parameter travels uncompressed.

        Args:
            name: The parameter's name.
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
            else fnmatchcase(name, rule)
            for rule in self.exact
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
