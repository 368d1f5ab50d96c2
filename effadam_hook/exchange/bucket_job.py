"""What an exchange does to one bucket: the two collectives' buffers, and the arithmetic between."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

__all__ = ["BucketJob"]


class BucketJob(Protocol):
    """One bucket's route through an exchange; implemented by :class:`effadam_hook.session.buffers.BucketBuffers`."""

    label: str
    """How messages name the bucket."""
    fingerprint: str
    """What must be the same on every rank: a digest of the layout."""
    bucket: Tensor
    """``[numel]``: DDP's buffer."""
    uplink: Tensor
    """``[servers, stride_bytes]`` uint8: what this worker sends."""
    received: Tensor
    """``[world_size, stride_bytes]`` uint8 on a server, empty elsewhere: what the workers sent."""
    outgoing: Tensor
    """``[copies, stride_bytes]`` uint8: what this server sends."""
    downlink: Tensor
    """``[servers, stride_bytes]`` uint8: what the servers sent."""

    @property
    def averages_first(self) -> bool:
        """Whether :attr:`bucket` is averaged, uncompressed, before it is encoded."""
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
