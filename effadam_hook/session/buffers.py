"""The buffers of one bucket, or of a part of it, and the three kernels on them.

All buffers are allocated once, at the first step of a bucket or at the first step with other
parameters than before; the other steps allocate none.

In the hierarchical topology the worker is the node, and this rank encodes its share of the node's
mean: input and worker residual have the compact layout of the share. Received chunks and the decoded
payload have the layout of the bucket.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from effadam_hook.exchange.node_bound import NodeBound
from effadam_hook.exchange.replica_check import ReplicaCheck
from effadam_hook.exchange.staging import Staging
from effadam_hook.exchange.streams import Event
from effadam_hook.exchange.topology import Topology
from effadam_hook.feedback.residuals import Place, Residuals
from effadam_hook.kernels import Kernels
from effadam_hook.kernels.arguments import compute_dtype
from effadam_hook.modes import Content
from effadam_hook.session.node_buffers import NodeBuffers
from effadam_hook.wire.layout import BucketLayout
from effadam_hook.wire.node_layout import Run

__all__ = ["BucketBuffers"]


class BucketBuffers:
    """The job that an exchange runs for one bucket, in every step.

    Args:
        label: Name of the bucket in messages.
        layout: Places of the elements in the payloads.
        runs: The elements that this rank encodes.
        node: The buffers inside the node; None in topologies without nodes.
        kernels: The implementation of the arithmetic.
        staging: The memory of the collectives.
        topology: This rank's view of the servers.
        dtype: Dtype of the uncompressed elements in the payloads.
        device: Device of the bucket.
        worker: Residuals of the worker; None without error feedback.
        server: Residuals of this rank as a server; None without error feedback.
        content: The vector to exchange: the gradient, or a vector computed from it.
        parameters: The parameters of the bucket.
        check_every_step: Whether the replica check includes a weight in every step.
        run_id: Run id of the model, part of the fingerprint.
    """

    def __init__(
        self,
        label: str,
        layout: BucketLayout,
        runs: Sequence[Run],
        node: NodeBuffers | None,
        kernels: Kernels,
        staging: Staging,
        topology: Topology,
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
        self._staging = staging
        self._server = topology.serves
        self._dtype = dtype
        self._content = content
        self._parameters = list(parameters)
        self.bucket = torch.empty(0, dtype=dtype, device=device)
        self.ready: Event | None = None
        self.bound: NodeBound | None = None
        precise = compute_dtype(dtype)

        def payload(rows: int, stride_bytes: int) -> Tensor:
            return staging.zeros((rows, stride_bytes), torch.uint8, device)

        up, down = layout.uplink, layout.downlink
        self.node = node
        self._runs = runs
        self._sent_wire = up if node is None else node.layout.uplink
        self.uplink = payload(len(self._sent_wire.chunks), up.stride_bytes)
        rows = len(topology.worker_ranks) if self._server is not None else 0
        self.received = payload(rows, up.stride_bytes)
        self.downlink = payload(topology.servers, down.stride_bytes)
        outgoing = topology.outgoing(self.served)
        self.outgoing = outgoing if outgoing is self.downlink else staging.adopt(outgoing)
        # The kernels' side of each: the same tensors without staging.
        self._uplink, self._received = staging.twin(self.uplink), staging.twin(self.received)
        self._outgoing, self._downlink = staging.twin(self.outgoing[0]), staging.twin(self.downlink)
        # Servers compare their workers; in a node, all ranks also compare all servers.
        self._checks: list[ReplicaCheck] = []
        if staging.sends_from_host:
            names = [slot.name for slot in layout.slots]
            compared = [(self.uplink, self.received, topology.worker_ranks)]
            if self.node is not None:
                compared.append((self.outgoing, self.downlink, topology.server_ranks))
            self._checks = [
                ReplicaCheck(digest, names, parameters, sent, got, staging, check_every_step, ranks)
                for sent, got, ranks in compared
            ]

        # Flags of the parameters that a step uses; apart, as two threads encode and reduce.
        flags = torch.zeros(2, len(layout.slots), dtype=torch.int32, device=device)
        self._used_input, self._used_mean = flags
        # Otherwise zeros in a gradient are found before they are sent.
        self._restores = content.adam is not None
        self._savepoint: list[int] = []
        self._saved: dict[int, list[tuple[Tensor, Tensor]]] = {}

        self._raw = up.as_raw()
        rows = int(content.sends_weights and self._server is not None)
        self._weights = torch.zeros(rows, self._raw.stride_bytes, dtype=torch.uint8, device=device)

        self._worker_residual = self._server_residual = None
        if worker is not None:
            places = [
                Place(layout.slots[run.slot].name, run.local, run.numel, run.offset) for run in runs
            ]
            numel = self._sent_wire.numel
            self._worker_residual = worker.adopt(places, numel, precise, device)
        if server is not None and self._server is not None:
            chunk = up.chunks[self._server]
            places = [
                Place(layout.slots[piece.slot].name, piece.local, piece.numel, piece.offset)
                for piece in chunk.pieces
            ]
            self._server_residual = server.adopt(places, chunk.numel, precise, device)

    def hold(self, bound: NodeBound) -> None:
        """Bound the node's mean gradient in this step, which the bucket keeps until it is known.

        Args:
            bound: The bound of the step.
        """
        assert self.node is not None
        self.bound = bound
        self.node.keep_mean()

    @property
    def averages_first(self) -> bool:
        """Return whether the bucket is averaged densely before the exchange of this step."""
        return self._content.averages_first

    def load(
        self,
        bucket: Tensor,
        check_weights: bool,
        steps: int = 0,
        is_joining: bool = True,
        in_backward: bool = False,
    ) -> None:
        """Begin a step.

        Args:
            bucket: ``[numel]``, DDP's buffer: read, and overwritten with the result.
            check_weights: Whether the replica check includes a weight.
            steps: Number of steps of the exchange, compared between the ranks.
            is_joining: Whether some ranks may make no optimizer steps, which are not compared then.
            in_backward: Whether :meth:`restore_unused` is called after the step.
        """
        self.bucket, self.bound = bucket, None
        self._content.begin()
        progress = 0 if is_joining else self._content.progress
        for check in self._checks:
            check.stamp(check_weights, steps, progress)
        self._savepoint.clear()
        if in_backward and self._restores:
            self._save_possibly_unused()

    def _save_possibly_unused(self) -> None:
        """Copy the residuals and moments of parameters without a gradient on this rank.

        A parameter that no rank used has ``.grad`` None on all ranks, before and after the
        exchange.
        """
        for index, parameter in enumerate(self._parameters):
            if parameter.grad is None:
                if index not in self._saved:
                    views = self._views_of(index)
                    self._saved[index] = [(view, torch.empty_like(view)) for view in views]
                for view, before in self._saved[index]:
                    before.copy_(view)
                self._savepoint.append(index)

    def _views_of(self, index: int) -> list[Tensor]:
        """Return the residuals and moments of one parameter that this rank holds."""
        flats = [] if self._worker_residual is None else [self._worker_residual]
        if self._content.adam is not None:
            flats += [self._content.adam.exp_avg, self._content.adam.exp_avg_sq]
        views = [
            flat[run.local : run.local + run.numel]
            for run in self._runs
            if run.slot == index
            for flat in flats
        ]
        if self._server_residual is not None and self._server is not None:
            views += [
                self._server_residual[piece.local : piece.local + piece.numel]
                for piece in self.layout.uplink.chunks[self._server].pieces
                if piece.slot == index
            ]
        return views

    def restore_unused(self) -> None:
        """Undo the step of the parameters that no rank used, after DDP has written gradients.

        DDP drops the result for them and leaves ``.grad`` None, on all ranks alike. Their residuals
        and moments must therefore not change.
        """
        for index in self._savepoint:
            parameter = self._parameters[index]
            if parameter.grad is None:
                for view, before in self._saved[index]:
                    view.copy_(before)
                self._content.withdraw(parameter)
        self._savepoint.clear()

    def pack(self) -> None:
        """Pack the bucket for the ranks of this node."""
        assert self.node is not None
        self.node.pack(self.bucket)

    @property
    def values(self) -> Tensor:
        """Return the vector to encode: the bucket, or the node's mean of this rank's share."""
        return self.bucket if self.node is None else self.node.mean

    def average(self) -> None:
        """Average what the ranks of this node have sent."""
        assert self.node is not None
        self.node.average()
        payload = self.node.payload
        if payload is not None and payload is not self.downlink:  # shared from this step on
            self.downlink = self._downlink = payload
            self._checks[-1].receive_in(payload)

    @property
    def served(self) -> Tensor:
        """Return the chunks of this rank's share."""
        return self.downlink if self.node is None else self.node.served

    def encode(self) -> None:
        """Encode the content and the worker residual into the uplink payload."""
        values, preconditioner = self.values, self._content.preconditioner
        if self.node is not None:
            preconditioner = self.node.share_of(preconditioner)
        # Momentum continues an Adam update without a gradient: no element is unused there.
        self._kernels.encode_(
            self._sent_wire,
            values,
            self._worker_residual,
            self._uplink,
            self._dtype,
            preconditioner=preconditioner,
            adam=self._content.adam,
            used=None if self._content.adam else self._used_input,
        )
        self._staging.send(self._uplink, self.uplink)
        for check in self._checks[:1]:
            check.write()

    def reduce(self) -> None:
        """Reduce the workers' chunks and the server residual into the downlink chunk."""
        assert self._server is not None
        if self._checks:
            self._checks[0].check()
        self._staging.receive(self.received, self._received)
        if self._content.sends_weights:
            self._reduce_to_weights(self._server)
        else:
            self._reduce_to_mean(self._server)
        self._staging.send(self._outgoing, self.outgoing[0])
        for check in self._checks[1:]:
            check.write()

    def _reduce_to_mean(self, server: int) -> None:
        """Decode the mean and encode it again."""
        self._kernels.reduce_encode_(
            self.layout.uplink,
            self.layout.downlink,
            server,
            self._received,
            self._server_residual,
            self._dtype,
            self._outgoing,
            preconditioner=self._content.preconditioner,
            used=self._used_mean,
        )

    def _reduce_to_weights(self, server: int) -> None:
        """Decode the mean, replace it by the server's new weights, and encode those."""
        up, raw, down = self.layout.uplink, self._raw, self.layout.downlink
        chunk = raw.chunks[server]
        self._kernels.reduce_encode_(
            up, raw, server, self._received, None, self._dtype, self._weights[0]
        )
        values = self._weights[0, : chunk.used_bytes].view(self._dtype)
        self._content.apply_on_server(values, self._server_residual, chunk.pieces)
        self._kernels.reduce_encode_(
            raw, down, server, self._weights, self._server_residual, self._dtype, self._outgoing
        )

    def decode(self) -> None:
        """Decode the downlink payload into the bucket or the weights."""
        for check in self._checks[1:]:
            check.check()
        self._staging.receive(self.downlink, self._downlink)
        self._kernels.decode(
            self.layout.downlink,
            self._downlink,
            self._content.target(self.bucket),
            self._dtype,
            preconditioner=self._content.preconditioner,
        )
        self._content.finish(self.bucket)

    def result(self) -> Tensor | None:
        """Return the decoded mean of the last compressed step again, for statistics.

        Returns:
            ``[numel]``, a new tensor, in units of the scaled loss; None if servers send weights.
        """
        if self._content.sends_weights:
            return None
        wire, device = self.layout.downlink, self._downlink.device
        mean = torch.empty(wire.numel, dtype=compute_dtype(self._dtype), device=device)
        preconditioner = self._content.preconditioner
        self._kernels.decode(wire, self._downlink, mean, self._dtype, preconditioner=preconditioner)
        return mean


def _digest(label: str, layout: BucketLayout, dtype: torch.dtype, run_id: str) -> int:
    wires = [
        (wire.quantizer.name, wire.scale_rule, wire.block_size, len(wire.chunks))
        for wire in (layout.uplink, layout.downlink)
    ]
    return zlib.crc32(repr((label, layout.slots, wires, dtype, run_id)).encode())
