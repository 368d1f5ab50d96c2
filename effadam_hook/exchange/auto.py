"""Which topology is faster here: a measurement on whose result all ranks agree."""

from __future__ import annotations

import torch
import torch.distributed as dist

from effadam_hook.errors import DisagreementError
from effadam_hook.exchange.probe import Probe
from effadam_hook.exchange.timing import slowest
from effadam_hook.exchange.topology import TOPOLOGIES

__all__ = ["agree_on_topology"]

_REPEATS = 5
_MARGIN = 0.95


def agree_on_topology(
    settled: str, payload_bytes: int, group: dist.ProcessGroup, device: torch.device
) -> tuple[str, str]:
    """The faster topology on this link; a collective operation.

    A payload is sent up and one down at the same time, as in the middle of a step.

    Args:
        settled: The topology that this rank has to use, as a saved state was made with it; or empty.
        payload_bytes: Bytes of a payload.
        group: The process group.
        device: Where the group's backend wants tensors.

    Returns:
        The topology's name, and why.

    Raises:
        DisagreementError: On every rank, if some have to use a topology and others do not.
    """
    own = ["", *TOPOLOGIES].index(settled)
    most, least = slowest([own, -own], group, device)
    if most != -least:
        raise DisagreementError(
            'Only some ranks have loaded a saved state, which decides topology="auto"; this rank '
            f"{'has' if settled else 'has not'}. Load it on every rank."
        )
    if settled:
        return settled, "as the saved state"
    probe = Probe(group, device)
    rank0_s, sharded_s = (
        2 * probe.time_both_ways(kind, payload_bytes, _REPEATS).seconds for kind in TOPOLOGIES
    )
    # Sharded asks for more connections; a tie is not worth them.
    name = "sharded" if sharded_s < _MARGIN * rank0_s else "rank0"
    return name, (
        f"{payload_bytes} bytes take {1e3 * rank0_s:.2f} ms in rank0 and {1e3 * sharded_s:.2f} ms in "
        "sharded"
    )
