"""One bucket, or part of one, planned: layout, buffers, residuals, and the three kernels on them.

Everything a bucket needs is allocated here, once, when DDP shows the bucket for the first time or
shows it with other parameters than before; a step allocates no buffer.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from effadam_hook.exchange.replica_check import ReplicaCheck
from effadam_hook.exchange.topology import Topology
from effadam_hook.feedback.residuals import Place, Residuals
from effadam_hook.feedback.unused import UnusedInput, UnusedMean
from effadam_hook.kernels import Kernels
from effadam_hook.kernels.arguments import compute_dtype
from effadam_hook.modes import Content
from effadam_hook.wire.layout import BucketLayout

__all__ = ["BucketBuffers"]


class BucketBuffers:
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
        parameters: The bucket's parameters.
        check_every_step: Whether to compare a weight with the other ranks' at every step.
        run_id: Tells this model's buckets from those of another model.
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
        content: Content,
        parameters: Sequence[Tensor],
        check_every_step: bool,
        run_id: str = "",
    ) -> None:
        self.label = label
        self.layout = layout
        digest = _digest(label, layout, dtype, run_id)
        self.fingerprint = f"{digest:08x}"
        self._kernels = kernels
        self._server = topology.serves
        self._dtype = dtype
        self._content = content
        self._parameters = list(parameters)
        self.bucket = torch.empty(0, dtype=dtype, device=device)
        precise = compute_dtype(dtype)

        def payload(rows: int, stride_bytes: int) -> Tensor:
            return torch.zeros(rows, stride_bytes, dtype=torch.uint8, device=device)

        up, down = layout.uplink, layout.downlink
        self.uplink = payload(topology.servers, up.stride_bytes)
        self.received = payload(world_size if self._server is not None else 0, up.stride_bytes)
        self.downlink = payload(topology.servers, down.stride_bytes)
        self.outgoing = topology.outgoing(self.downlink)
        self._replica_check: ReplicaCheck | None = None
        if device.type == "cpu":
            names = [slot.name for slot in layout.slots]
            self._replica_check = ReplicaCheck(
                digest, names, parameters, self.uplink, self.received, check_every_step
            )

        # To look at a gradient on another device, the host would have to wait for it.
        self._looks_at: tuple[UnusedInput, UnusedMean] | None = None
        if device.type == "cpu":
            self._looks_at = UnusedInput(up), UnusedMean(up, down, self._server or 0)

        # Elsewhere zeros in a gradient are seen before they are sent.
        self._restores = content.adam is not None or self._looks_at is None
        self._savepoint: list[tuple[Tensor, list[tuple[Tensor, Tensor]]]] = []

        self._raw = up.as_raw()
        rows = int(content.sends_weights and self._server is not None)
        self._weights = payload(rows, self._raw.stride_bytes)

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

    def load(
        self,
        bucket: Tensor,
        look: bool,
        steps: int = 0,
        is_joining: bool = True,
        in_backward: bool = False,
    ) -> None:
        """Begin a step.

        Args:
            bucket: ``[numel]``, DDP's buffer, read and in the end overwritten.
            look: Whether to compare a weight with the other ranks'.
            steps: How many steps the exchange has made, to be compared likewise.
            is_joining: Whether some ranks may make no optimizer steps, so that those are not compared.
            in_backward: Whether :meth:`restore_unused` will be called after the step.
        """
        self.bucket = bucket
        self._content.begin()
        if self._replica_check is not None:
            self._replica_check.stamp(look, steps, 0 if is_joining else self._content.progress)
        self._savepoint.clear()
        if in_backward and self._restores:
            self._save_possibly_unused()

    def _save_possibly_unused(self) -> None:
        """Copy what the exchange will change for parameters without a gradient on this rank.

        If no rank used one, ``.grad`` is None on all of them, before the exchange and after it.
        """
        for index, parameter in enumerate(self._parameters):
            if parameter.grad is None:
                views = self._views_of(index)
                self._savepoint.append((parameter, [(view, view.clone()) for view in views]))

    def _views_of(self, index: int) -> list[Tensor]:
        """Residuals and moments of one of the bucket's parameters, as far as this rank has them."""
        slot = self.layout.slots[index]
        here = slice(slot.start, slot.start + slot.numel)
        views = []
        if self._worker_residual is not None:
            views.append(self._worker_residual[here])
        if self._content.adam is not None:
            views += [self._content.adam.exp_avg[here], self._content.adam.exp_avg_sq[here]]
        if self._server_residual is not None and self._server is not None:
            for piece in self.layout.uplink.chunks[self._server].pieces:
                if piece.slot == index:
                    views.append(self._server_residual[piece.local : piece.local + piece.numel])
        return views

    def restore_unused(self) -> None:
        """Undo the step for the parameters that no rank used; called when DDP has written gradients.

        DDP drops the result for them, so that nothing may have been taken from their residuals. It
        decides for all ranks alike, and leaves ``.grad`` None.
        """
        for parameter, views in self._savepoint:
            if parameter.grad is None:
                for view, before in views:
                    view.copy_(before)
                self._content.withdraw(parameter)
        self._savepoint.clear()

    def encode(self) -> None:
        """What is exchanged, and the worker residual, into the uplink's payload."""
        with self._unused_input():
            self._kernels.encode_(
                self.layout.uplink,
                self.bucket,
                self._worker_residual,
                self.uplink,
                self._dtype,
                preconditioner=self._content.preconditioner,
                adam=self._content.adam,
            )

    def reduce(self) -> None:
        """What the workers sent and the server residual into the downlink's chunk."""
        assert self._server is not None
        if self._replica_check is not None:
            self._replica_check.check()
        if self._content.sends_weights:
            self._reduce_to_weights(self._server)
            return
        with self._unused_mean():
            self._kernels.reduce_encode_(
                self.layout.uplink,
                self.layout.downlink,
                self._server,
                self.received,
                self._server_residual,
                self._dtype,
                self.outgoing[0],
                preconditioner=self._content.preconditioner,
            )

    def _unused_input(self) -> AbstractContextManager[None]:
        # An Adam update goes on by momentum where there is no gradient: nothing is idle there.
        if self._looks_at is None or self._worker_residual is None or self._content.adam:
            return contextlib.nullcontext()
        return self._looks_at[0].put_aside(self.bucket, self._worker_residual)

    def _unused_mean(self) -> AbstractContextManager[None]:
        if self._looks_at is None or self._server_residual is None:
            return contextlib.nullcontext()
        return self._looks_at[1].put_aside(self.received, self._server_residual)

    def _reduce_to_weights(self, server: int) -> None:
        """The mean uncompressed, then the server's new weights in its place, then those encoded."""
        up, raw, down = self.layout.uplink, self._raw, self.layout.downlink
        chunk = raw.chunks[server]
        self._kernels.reduce_encode_(
            up, raw, server, self.received, None, self._dtype, self._weights[0]
        )
        values = self._weights[0, : chunk.used_bytes].view(self._dtype)
        self._content.apply_on_server(values, self._server_residual, chunk.pieces)
        self._kernels.reduce_encode_(
            raw, down, server, self._weights, self._server_residual, self._dtype, self.outgoing[0]
        )

    def decode(self) -> None:
        """The downlink's payload to where it belongs."""
        self._kernels.decode(
            self.layout.downlink,
            self.downlink,
            self._content.target(self.bucket),
            self._dtype,
            preconditioner=self._content.preconditioner,
        )
        self._content.finish(self.bucket)


def _digest(label: str, layout: BucketLayout, dtype: torch.dtype, run_id: str) -> int:
    wires = [
        (wire.quantizer.name, wire.scale_rule, wire.block_size, len(wire.chunks))
        for wire in (layout.uplink, layout.downlink)
    ]
    return zlib.crc32(repr((label, layout.slots, wires, dtype, run_id)).encode())
