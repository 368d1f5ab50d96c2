"""The choice of the faster topology, from a measurement that is the same on all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from effadam_hook.errors import DisagreementError
from effadam_hook.exchange.probe import Probe
from effadam_hook.exchange.timing import slowest
from effadam_hook.exchange.topology import FLAT_TOPOLOGIES

__all__ = ["agree_on_topology"]

_REPEATS = 5
_MARGIN = 0.95


def agree_on_topology(
    loaded: str, payload_bytes: int, group: dist.ProcessGroup, device: torch.device
) -> tuple[str, str]:
    """Choose the faster topology on this link; a collective operation.

    An uplink and a downlink are timed at the same time, as in the middle of a step.

    Args:
        loaded: Topology of the saved state that this rank has loaded, which decides; empty without
            one.
        payload_bytes: Bytes of a payload.
        group: The process group.
        device: A device whose tensors the group's backend can send.

    Returns:
        The name of the topology, and the reason.

    Raises:
        DisagreementError: On every rank, if only some ranks have loaded a saved state.
    """
    own = ["", *FLAT_TOPOLOGIES].index(loaded)
    most, least = slowest([own, -own], group, device)
    if most != -least:
        raise DisagreementError(
            'Only some ranks have loaded a saved state, which decides topology="auto"; this rank '
            f"{'has' if loaded else 'has not'}. Load it on every rank."
        )
    if loaded:
        return loaded, "as the saved state"
    probe = Probe(group, device)
    rank0_s, sharded_s = (
        2 * probe.time_both_ways(kind, payload_bytes, _REPEATS).seconds for kind in FLAT_TOPOLOGIES
    )
    # Sharded needs more connections; a tie is not worth them.
    name = "sharded" if sharded_s < _MARGIN * rank0_s else "rank0"
    return name, (
        f"{payload_bytes} bytes take {1e3 * rank0_s:.2f} ms in rank0 and {1e3 * sharded_s:.2f} ms in "
        "sharded"
    )
