"""Every way to average gradients that is predicted or compared, by name.

==========================  ==================================================================
``none``                    no communication at all: the ceiling
``fp32``                    DDP's own all-reduce; what ``enabled=False`` does
``fp16`` ``bf16``           torch's hooks of that name
``powersgd1`` .. ``4``      torch's PowerSGD hook of that rank, all parameters in one bucket: with
                            two or more buckets it hangs or aborts on Gloo
``lloyd4`` and the like     this project, gradient mode, at that quantizer
``update:lloyd2``           this project, update mode (``EfficientAdam``)
==========================  ==================================================================

Ours take ``/rank0`` or ``/sharded`` behind the quantizer; ``sharded`` is meant where nothing is said.
Any takes ``@5`` at the end: DDP buckets of 5 MB in place of its default of 25.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from effadam_hook.exchange.topology import TOPOLOGIES
from effadam_hook.wire.quantizers import QUANTIZERS

__all__ = ["Method", "expand_names"]

_DEFAULT_TOPOLOGY = "sharded"
_NAME = re.compile(r"(?P<rest>[^@]+)(@(?P<cap>[0-9.]+))?")


@dataclass(frozen=True)
class Method:
    """A way to average gradients, as its name says.

    Attributes:
        name: The name, see the module.
        kind: ``"none"``, ``"dense"``, ``"cast"``, ``"powersgd"``, ``"gradient"`` or ``"update"``.
        quantizer: Ours: the quantizer. ``"cast"``: the dtype.
        topology: Ours: who is the server.
        rank: PowerSGD's.
        bucket_mb: DDP's ``bucket_cap_mb``; None is its default.
    """

    name: str
    kind: str
    quantizer: str = ""
    topology: str = _DEFAULT_TOPOLOGY
    rank: int = 0
    bucket_mb: float | None = None

    @property
    def is_ours(self) -> bool:
        """Whether it is this project's."""
        return self.kind in ("gradient", "update")

    @property
    def arithmetic(self) -> str:
        """What its speed depends on: the name without topology and buckets; empty for none."""
        if self.kind in ("none", "dense"):
            return ""
        return self.name.partition("@")[0].partition("/")[0]

    @classmethod
    def parse(cls, name: str) -> Method:
        """The method of a name.

        Args:
            name: See the module.

        Returns:
            The method.

        Raises:
            ValueError: If there is none of that name.
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
            return cls(name, "powersgd", rank=int(rank))
        kind = "update" if rest.startswith("update:") else "gradient"
        quantizer, _, topology = rest.removeprefix("update:").partition("/")
        if quantizer not in QUANTIZERS or (topology or _DEFAULT_TOPOLOGY) not in TOPOLOGIES:
            raise _unknown(name)
        return cls(name, kind, quantizer, topology or _DEFAULT_TOPOLOGY, bucket_mb=bucket_mb)

    def with_buckets(self, bucket_mb: float | None) -> Method:
        """The same with other buckets, unless the name says which, or there is only ever one."""
        fixed = self.bucket_mb is not None or self.kind == "powersgd"
        return self if fixed else replace(self, bucket_mb=bucket_mb)


def _unknown(name: str) -> ValueError:
    return ValueError(
        f"Invalid method: {name!r}. Must be none, fp32, fp16, bf16, powersgdR with a rank R, or a "
        f"quantizer ({', '.join(QUANTIZERS)}), with 'update:' in front of it for update mode and "
        "'/sharded' or '/rank0' behind it; '@5' at the end means buckets of 5 MB."
    )


def expand_names(text: str) -> Iterator[str]:
    """Names from a comma-separated list in which ``{a,b}`` stands for either.

    Args:
        text: Such as ``"fp32,{lloyd4,lloyd2}/sharded"``.

    Yields:
        One name after the other.
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
    choices, _, after = rest.partition("}")
    for choice in choices.split(","):
        yield from _expand(before + choice + after)
