"""The interface of a bucket job: the buffers of the collectives, and the arithmetic between them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

__all__ = ["BucketJob"]


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
    uplink: Tensor
    """``[servers, stride_bytes]`` uint8: the payload that this worker sends."""
    received: Tensor
    """``[world_size, stride_bytes]`` uint8 on a server, empty elsewhere: the workers' chunks."""
    outgoing: Tensor
    """``[copies, stride_bytes]`` uint8: the chunk that this server sends."""
    downlink: Tensor
    """``[servers, stride_bytes]`` uint8: the payload that the servers send."""

    @property
    def averages_first(self) -> bool:
        """Return whether :attr:`bucket` is averaged, uncompressed, before it is encoded."""
        ...

    def encode(self) -> None:
        """Encode :attr:`bucket` and the worker residual into :attr:`uplink`."""
        ...

    def reduce(self) -> None:
        """Reduce :attr:`received` and the server residual into ``outgoing[0]``, on a server."""
        ...

    def decode(self) -> None:
        """Decode :attr:`downlink` into the bucket."""
        ...
