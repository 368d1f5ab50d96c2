"""Who serves what: the part of an exchange that differs between "rank0" and "sharded"."""

from __future__ import annotations

from typing import Protocol

import torch.distributed as dist
from torch import Tensor

__all__ = ["Topology"]


class Topology(Protocol):
    """One rank's view of the servers, and the two collectives that reach them."""

    name: str
    """The public name."""
    servers: int
    """How many servers there are, and so how many chunks a payload has."""
    serves: int | None
    """Which chunk this rank is the server of, if any."""

    def outgoing(self, downlink: Tensor) -> Tensor:
        """A buffer ``[stride_bytes]`` for what this rank sends as a server.

        Args:
            downlink: ``[servers, stride_bytes]``, the buffer of the downlink's payload.
        """
        ...

    def send_up(
        self, payload: Tensor, received: Tensor, group: dist.ProcessGroup
    ) -> dist.Work | None:
        """Start the uplink.

        Args:
            payload: ``[servers, stride_bytes]``, this worker's chunk for every server.
            received: ``[world_size, stride_bytes]``, filled with every worker's chunk for this
                server; empty where this rank is none.
            group: The process group.

        Returns:
            The work to wait for.
        """
        ...

    def send_down(
        self, outgoing: Tensor, payload: Tensor, group: dist.ProcessGroup
    ) -> dist.Work | None:
        """Start the downlink.

        Args:
            outgoing: What :meth:`outgoing` returned, filled.
            payload: ``[servers, stride_bytes]``, filled with every server's chunk.
            group: The process group.

        Returns:
            The work to wait for.
        """
        ...
