"""One bucket, planned: its layout, its buffers, its residuals, and the three kernels applied to them.

Everything a bucket needs is allocated here, once, when DDP shows the bucket for the first time or
shows it with other parameters than before; a step allocates nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effadam_hook.exchange import Topology
from effadam_hook.kernels import Kernels
from effadam_hook.layout import BucketLayout
from effadam_hook.modes import GradientContent
from effadam_hook.residuals import Place, Residuals

__all__ = ["BucketPlan"]


class BucketPlan:
    """The job that an exchange runs for one bucket, step after step.

    Args:
        label: How messages name the bucket.
        layout: Where its elements lie in the payloads.
        kernels: The implementation of the arithmetic.
        topology: Who is the server.
        world_size: How many workers there are.
        dtype: The dtype in which uncompressed elements travel.
        device: Its device.
        worker: The worker's residuals, or None without error feedback.
        server: The server's residuals, or None without error feedback.
        content: What is exchanged: the gradient, or what is made of it.
    """

    def __init__(
        self,
        label: str,
        layout: BucketLayout,
        kernels: Kernels,
        topology: Topology,
        world_size: int,
        dtype: torch.dtype,
        device: torch.device,
        worker: Residuals | None,
        server: Residuals | None,
        content: GradientContent,
    ) -> None:
        self.label = label
        self.layout = layout
        self.fingerprint = layout.fingerprint(dtype)
        self._kernels = kernels
        self._server = topology.serves
        self._dtype = dtype
        self._content = content
        self.bucket = torch.empty(0, dtype=dtype, device=device)
        precise = torch.float64 if dtype == torch.float64 else torch.float32

        def payload(rows: int, stride_bytes: int) -> Tensor:
            return torch.zeros(rows, stride_bytes, dtype=torch.uint8, device=device)

        up, down = layout.uplink, layout.downlink
        self.uplink = payload(topology.servers, up.stride_bytes)
        self.received = payload(world_size if self._server is not None else 0, up.stride_bytes)
        self.downlink = payload(topology.servers, down.stride_bytes)
        self.outgoing = topology.outgoing(self.downlink)

        self._worker_residual = self._server_residual = None
        if worker is not None:
            places = [Place(slot.name, slot.start, slot.numel) for slot in layout.slots]
            self._worker_residual = worker.adopt(places, layout.numel, precise, device)
        if server is not None and self._server is not None:
            chunk = up.chunks[self._server]
            places = [Place(layout.slots[p.slot].name, p.local, p.numel) for p in chunk.pieces]
            self._server_residual = server.adopt(places, chunk.numel, precise, device)

    @property
    def averages_first(self) -> bool:
        """Whether the bucket itself is averaged, uncompressed, before this step's exchange."""
        return self._content.averages_first

    def load(self, bucket: Tensor) -> None:
        """Begin a step.

        Args:
            bucket: ``[numel]``, DDP's buffer, read and in the end overwritten.
        """
        self.bucket = bucket
        self._content.begin()

    def encode(self) -> None:
        """What is exchanged, and the worker residual, into the uplink's payload."""
        self._kernels.encode_(
            self.layout.uplink,
            self.bucket,
            self._worker_residual,
            self.uplink,
            self._dtype,
            **self._fused("preconditioner", "adam"),
        )

    def reduce(self) -> None:
        """What the workers sent and the server residual into the downlink's chunk."""
        assert self._server is not None
        self._kernels.reduce_encode_(
            self.layout.uplink,
            self.layout.downlink,
            self._server,
            self.received,
            self._server_residual,
            self._dtype,
            self.outgoing,
            **self._fused("preconditioner"),
        )

    def decode(self) -> Tensor:
        """The downlink's payload to where it belongs."""
        self._kernels.decode(
            self.layout.downlink,
            self.downlink,
            self._content.target(self.bucket),
            self._dtype,
            **self._fused("preconditioner"),
        )
        self._content.finish(self.bucket)
        return self.bucket

    def _fused(self, *names: str) -> dict:
        values = {name: getattr(self._content, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}
