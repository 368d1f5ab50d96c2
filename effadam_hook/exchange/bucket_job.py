"""The interface of a bucket job: the buffers of the collectives, and the arithmetic between them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from effadam_hook.exchange.node_bound import NodeBound
from effadam_hook.exchange.streams import Event

__all__ = ["BucketJob", "NodeTransfer"]


class NodeTransfer(Protocol):
    """The transfer with which the ranks of a node exchange shares of a bucket.

    Sizes are bytes for each local rank, in the order of the ranks.
    """

    packed_bytes: Tensor
    """``[sum of packed_sizes]`` uint8: what is sent to every local rank, one after the other.
    That is its share with a note behind it, and nothing for this rank; one byte if memory is shared."""
    packed_sizes: list[int]
    """Bytes for each local rank."""
    received_bytes: Tensor
    """``[sum of received_sizes]`` uint8: what every local rank sends: this rank's share, and a note."""
    received_sizes: list[int]
    """Bytes from each local rank."""

    @property
    def is_shared(self) -> bool:
        """Return whether the ranks read from one another's memory, so that they only meet."""
        ...


class BucketJob(Protocol):
    """One bucket, as an exchange processes it.

    :class:`effadam_hook.session.buffers.BucketBuffers` implements it.
    """

    label: str
    """Name of the bucket in messages."""
    fingerprint: str
    """Digest of the layout, the same on every rank."""
    bucket: Tensor
    """``[numel]``: DDP's buffer."""
    ready: Event | None
    """Point of the device at which :attr:`bucket` is filled; None where the host fills it."""
    bound: NodeBound | None
    """Bound on the norm of the node's mean gradient in this step; None without one."""
    uplink: Tensor
    """``[servers of this rank's share, stride_bytes]`` uint8: the payload that this rank sends."""
    received: Tensor
    """``[workers, stride_bytes]`` uint8 on a server, empty elsewhere: the workers' chunks."""
    outgoing: Tensor
    """``[copies, stride_bytes]`` uint8: the chunk that this server sends."""
    downlink: Tensor
    """``[servers, stride_bytes]`` uint8: the payload that the servers send."""

    @property
    def served(self) -> Tensor:
        """Return a part of :attr:`downlink`, or all of it: the chunks of this rank's share."""
        ...

    @property
    def node(self) -> NodeTransfer | None:
        """Return the transfer within the node; None in topologies without one."""
        ...

    @property
    def averages_first(self) -> bool:
        """Return whether :attr:`values` are averaged, uncompressed, before they are encoded."""
        ...

    @property
    def values(self) -> Tensor:
        """Return the vector to encode: :attr:`bucket`, or the node's mean of this rank's share."""
        ...

    def pack(self) -> None:
        """Copy :attr:`bucket` into the packed bytes of :attr:`node`."""
        ...

    def average(self) -> None:
        """Average what :attr:`node` has received into :attr:`values`."""
        ...

    def encode(self) -> None:
        """Encode :attr:`values` and the worker residual into :attr:`uplink`."""
        ...

    def reduce(self) -> None:
        """Reduce :attr:`received` and the server residual into ``outgoing[0]``, on a server."""
        ...

    def decode(self) -> None:
        """Decode :attr:`downlink` into the bucket."""
        ...
