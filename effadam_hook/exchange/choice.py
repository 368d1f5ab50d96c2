"""Who is faster, and what is slowest: measurements on whose results all ranks agree."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from effadam_hook.errors import DisagreementError
from effadam_hook.exchange.topology import KINDS, Topology, make_topology

__all__ = ["agree_on_topology", "slowest"]

_REPEATS = 5
_MARGIN = 0.95


def slowest(
    seconds: Sequence[float], group: dist.ProcessGroup, device: torch.device
) -> list[float]:
    """The largest of each number over all ranks; a collective operation.

    Args:
        seconds: This rank's numbers.
        group: The process group.
        device: Where the group's backend wants tensors.

    Returns:
        The same numbers on every rank.
    """
    values = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    largest: list[float] = values.tolist()
    return largest


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
    own = ["", *KINDS].index(settled)
    most, least = slowest([own, -own], group, device)
    if most != -least:
        raise DisagreementError(
            'Only some ranks have loaded a saved state, which decides topology="auto"; this rank '
            f"{'has' if settled else 'has not'}. Load it on every rank."
        )
    if settled:
        return settled, "as the saved state"
    times = []
    for kind in KINDS:
        topology = make_topology(kind, group)
        times.append(_time(topology, payload_bytes // topology.servers + 1, group, device))
    rank0_s, sharded_s = slowest(times, group, device)
    # Sharded asks for more connections; a tie is not worth them.
    name = "sharded" if sharded_s < _MARGIN * rank0_s else "rank0"
    return name, (
        f"{payload_bytes} bytes take {1e3 * rank0_s:.2f} ms in rank0 and {1e3 * sharded_s:.2f} ms in "
        "sharded"
    )


def _time(
    topology: Topology, stride_bytes: int, group: dist.ProcessGroup, device: torch.device
) -> float:
    def buffer(rows: int) -> Tensor:
        return torch.zeros(rows, stride_bytes, dtype=torch.uint8, device=device)

    sent, downlink = buffer(topology.servers), buffer(topology.servers)
    received = buffer(group.size() if topology.serves is not None else 0)
    outgoing = topology.outgoing(downlink)
    seconds = []
    for _ in range(1 + _REPEATS):
        dist.all_reduce(torch.zeros(1, device=device), group=group)  # all ranks begin together
        _finish(device)
        start = time.perf_counter()
        up = topology.send_up(sent, received, group)
        down = topology.send_down(outgoing, downlink, group)
        for work in (up, down):
            if work is not None:
                work.wait()
        _finish(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])  # the first one connects


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
