"""Names of the methods that average gradients, as predicted and compared by this package.

==========================  ==================================================================
``none``                    no communication: the upper limit of speed
``fp32`` or ``off``         DDP's own all-reduce, the same as ``enabled=False``
``fp16`` ``bf16``           torch's hooks of that name
``powersgd1`` .. ``4``      torch's PowerSGD hook of that rank, all parameters in one bucket: with
                            two or more buckets it hangs or aborts on Gloo
``lloyd4`` and the like     this project in gradient mode, with that quantizer
``update:lloyd2``           this project in update mode (``EfficientAdam``)
==========================  ==================================================================

A method of this project accepts ``/hierarchical``, ``/sharded`` or ``/rank0`` after the quantizer. The
default is ``/auto``, the rule of ``topology="auto"``: hierarchical where nodes have several ranks, else
sharded. Every method but PowerSGD accepts ``@5`` at the end: DDP buckets of 5 MB instead of the default
25.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from effadam_hook.exchange.topology import AUTO, HIERARCHICAL, TOPOLOGIES
from effadam_hook.wire.quantizers import QUANTIZERS

__all__ = ["Method", "expand_names"]

_CHOICES = (AUTO, *TOPOLOGIES)
_FLAT = "sharded"
_NAME = re.compile(r"(?P<rest>[^@]+)(@(?P<cap>[0-9.]+))?")


@dataclass(frozen=True)
class Method:
    """A method of averaging gradients, parsed from its name.

    Attributes:
        name: The name, as described in the module's docstring.
        kind: ``"none"``, ``"dense"``, ``"cast"``, ``"powersgd"``, ``"gradient"`` or ``"update"``.
        quantizer: Quantizer, for ``"gradient"`` and ``"update"``; dtype, for ``"cast"``.
        topology: Topology, for ``"gradient"`` and ``"update"``.
        rank: Rank of the approximation, for ``"powersgd"``.
        bucket_mb: DDP's ``bucket_cap_mb``; None for its default.
    """

    name: str
    kind: str
    quantizer: str = ""
    topology: str = AUTO
    rank: int = 0
    bucket_mb: float | None = None

    @property
    def is_effadam(self) -> bool:
        """Return whether this project implements the method."""
        return self.kind in ("gradient", "update")

    @property
    def arithmetic(self) -> str:
        """Return the name without topology and buckets; empty if the method has no arithmetic.

        Methods with equal values take equal time for encoding, reducing and decoding.
        """
        if self.kind in ("none", "dense"):
            return ""
        return self.name.partition("@")[0].partition("/")[0]

    @classmethod
    def parse(cls, name: str) -> Method:
        """Parse the name of a method.

        Args:
            name: A name, as described in the module's docstring.

        Returns:
            The method.

        Raises:
            ValueError: If the name is unknown.
        """
        match = _NAME.fullmatch(name)
        try:
            bucket_mb = float(match["cap"]) if match and match["cap"] else None
        except ValueError:
            match = None
        if match is None or bucket_mb == 0:
            raise _unknown(name)
        rest = match["rest"]
        fixed = {"none": "none", "fp32": "dense", "off": "dense"}
        if rest in fixed:
            return cls(name, fixed[rest], bucket_mb=bucket_mb)
        if rest in ("fp16", "bf16"):
            return cls(name, "cast", rest, bucket_mb=bucket_mb)
        if rest.startswith("powersgd"):
            rank = rest.removeprefix("powersgd")
            if not rank.isdecimal() or int(rank) < 1:
                raise _unknown(name)
            if bucket_mb is not None:
                raise ValueError(
                    f"Invalid method {name!r}: PowerSGD has one bucket. Must be {rest!r}."
                )
            return cls(name, "powersgd", rank=int(rank))
        kind = "update" if rest.startswith("update:") else "gradient"
        quantizer, _, topology = rest.removeprefix("update:").partition("/")
        if quantizer not in QUANTIZERS or (topology or AUTO) not in _CHOICES:
            raise _unknown(name)
        return cls(name, kind, quantizer, topology or AUTO, bucket_mb=bucket_mb)

    def on_nodes(self, ranks_per_node: int) -> Method:
        """Return the method with the topology that the ranks use.

        ``auto`` becomes a topology by the rule. With one rank a node, hierarchical is sharded.

        Args:
            ranks_per_node: Number of ranks of a node.
        """
        if not self.is_effadam or self.topology not in (AUTO, HIERARCHICAL):
            return self
        return replace(self, topology=HIERARCHICAL if ranks_per_node > 1 else _FLAT)

    def with_buckets(self, bucket_mb: float | None) -> Method:
        """Return the method with another bucket size.

        The size remains unchanged if the name contains one, and for PowerSGD, which has one bucket.

        Args:
            bucket_mb: DDP's ``bucket_cap_mb``; None for its default.
        """
        fixed = self.bucket_mb is not None or self.kind == "powersgd"
        return self if fixed else replace(self, bucket_mb=bucket_mb)


def _unknown(name: str) -> ValueError:
    return ValueError(
        f"Invalid method: {name!r}. Must be none, fp32, fp16, bf16, powersgdR with a rank R, or a "
        f"quantizer ({', '.join(QUANTIZERS)}), with 'update:' before it for update mode and "
        f"{', '.join(repr('/' + one) for one in _CHOICES)} after it; '@5' at the end means buckets of "
        "5 MB."
    )


def expand_names(text: str) -> Iterator[str]:
    """Expand a comma-separated list of names in which ``{a,b}`` stands for ``a`` and ``b``.

    Args:
        text: The list, for example ``"fp32,{lloyd4,lloyd2}/sharded"``.

    Yields:
        The names, in their order.
    """
    depth, start = 0, 0
    for index, letter in enumerate(text + ","):
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            yield from _expand(text[start:index].strip())
            start = index + 1


def _expand(name: str) -> Iterator[str]:
    before, brace, rest = name.partition("{")
    if not brace:
        if name:
            yield name
        return
    alternatives, _, after = rest.partition("}")
    for alternative in alternatives.split(","):
        yield from _expand(before + alternative + after)
