"""What an exchange does to one bucket: the two collectives' buffers, and the arithmetic between."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

__all__ = ["BucketJob", "NodeTransfer"]


class NodeTransfer(Protocol):
    """The transfer with which the ranks of a node exchange shares of a bucket.

    Sizes are bytes for each local rank, in the order of the ranks.
    """

    packed_bytes: Tensor
    """``[bucket bytes]`` uint8: the share of every local rank, one after the other."""
    packed_sizes: list[int]
    """Bytes of each share."""
    received_bytes: Tensor
    """``[ranks of the node * share bytes]`` uint8: this rank's share of every local rank's bucket."""
    received_sizes: list[int]
    """Bytes of this rank's share, once for each local rank."""


class BucketJob(Protocol):
    """One bucket in an exchange.

    :class:`effadam_hook.session.buffers.BucketBuffers` implements it.
    """

    label: str
    """How messages name the bucket."""
    fingerprint: str
    """What must be the same on every rank: a digest of the layout."""
    bucket: Tensor
    """``[numel]``: DDP's buffer."""
    uplink: Tensor
    """``[servers of this rank's share, stride_bytes]`` uint8: what this rank sends for its worker."""
    received: Tensor
    """``[workers, stride_bytes]`` uint8 on a server, empty elsewhere: what the workers sent."""
    outgoing: Tensor
    """``[copies, stride_bytes]`` uint8: what this server sends."""
    downlink: Tensor
    """``[servers, stride_bytes]`` uint8: what the servers sent, to be decoded."""
    served: Tensor
    """``[servers of this rank's share, stride_bytes]`` uint8: a part of :attr:`downlink`, or all."""

    @property
    def node(self) -> NodeTransfer | None:
        """The transfer within the node; None in topologies without one."""
        ...

    @property
    def averages_first(self) -> bool:
        """Whether :attr:`bucket` is averaged, uncompressed, before it is encoded."""
        ...

    def pack(self) -> None:
        """:attr:`bucket` into the packed bytes of :attr:`node`."""
        ...

    def encode(self) -> None:
        """:attr:`bucket` and worker residual into :attr:`uplink`."""
        ...

    def reduce(self) -> None:
        """:attr:`received` and server residual into the first row of :attr:`outgoing`; on a server."""
        ...

    def decode(self) -> None:
        """:attr:`downlink` into the bucket."""
        ...
