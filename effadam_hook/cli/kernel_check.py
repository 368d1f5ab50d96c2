"""Check that a method was measured with the intended kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["KernelsError", "KernelsUsed", "check_kernels"]


class KernelsError(RuntimeError):
    """A method of this project did not run on the kernels that are to be measured."""


@dataclass(frozen=True)
class KernelsUsed:
    """Kernels of one rank in one cell.

    Attributes:
        name: Name of the implementation, from the state's ``summary()``.
        build_before: Digest of the compiled library when the rank started.
        build_after: The same when the cell ended. The library is loaded in between, so equal digests
            mean that this library ran.
    """

    name: str
    build_before: str
    build_after: str


def check_kernels(method: str, used: Sequence[KernelsUsed]) -> str:
    """Check that all ranks ran the same fused kernels, from one build that did not change.

    Args:
        method: Name of the method, for the message.
        used: Kernels of the ranks, in the ranks' order.

    Returns:
        Implementation and build, for the record.

    Raises:
        KernelsError: If a rank ran the reference kernels, or if implementations or builds differ.
    """
    names = sorted({one.name for one in used})
    builds = sorted({build for one in used for build in (one.build_before, one.build_after)})
    if any(name.split()[0] == "reference" for name in names):
        raise KernelsError(
            f"{method} ran on the reference kernels: {', '.join(one.name for one in used)}, by rank. "
            "Must be the fused kernels, as other times are meaningless: leave EFFADAM_KERNELS unset, "
            "and read the warning of the first such rank for the reason."
        )
    if len(names) > 1 or len(builds) > 1:
        raise KernelsError(
            f"{method} did not run on one build of the kernels: found {', '.join(names)} with the "
            f"libraries {', '.join(builds)}. Must be one build on all ranks during the whole run: do "
            "not build the package while it is measured."
        )
    return f"{names[0]} {builds[0]}"
