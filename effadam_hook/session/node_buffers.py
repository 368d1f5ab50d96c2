"""The buffers of one bucket inside a node: packed shares, the local ranks' parts, their mean.

On a CPU the ranks of a node read the shares from one another's memory, see
:mod:`effadam_hook.session.node_memory`, and only meet over Gloo. They find out in the first two
exchanges of a bucket, in which shares are sent::

    first     shares, and the ticket of the memory in which this rank packs
    second    shares, and whether this rank has mapped the memory of all others
    others    one byte, if all ranks have mapped all memory; else shares

A rank packs a bucket again only after the exchange, which ends after all ranks of the node have
averaged: they contribute to its last stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from effadam_hook.exchange.staging import Staging
from effadam_hook.kernels.fusions import Preconditioner
from effadam_hook.session.node_memory import TICKET_BYTES, SharedMemory, open_ticket, share
from effadam_hook.wire.node_layout import NodeLayout, Run

__all__ = ["NodeBuffers"]

_ALIGN_BYTES = 64
_NOTE_BYTES = 64
"""Bytes after each share, for a ticket or an answer."""


class NodeBuffers:
    """Average the share of a rank over the ranks of its node.

    Args:
        layouts: The shares of all local ranks.
        own: Index of this rank in its node.
        dtype: The bucket's dtype.
        precise: The arithmetic's dtype.
        device: The bucket's device.
        staging: The memory of the collectives, where that is not shared.

    Attributes:
        layout: This rank's share.
        mean: ``[share numel]``, the node's mean of it.
        packed_bytes: See :class:`~effadam_hook.exchange.bucket_job.NodeTransfer`.
        packed_sizes: Likewise.
        received_bytes: Likewise.
        received_sizes: Likewise.
        is_shared: Whether the ranks read from one another's memory.
    """

    def __init__(
        self,
        layouts: Sequence[NodeLayout],
        own: int,
        dtype: torch.dtype,
        precise: torch.dtype,
        device: torch.device,
        staging: Staging,
    ) -> None:
        self.layout, self.is_shared = layouts[own], False
        self.mean = torch.zeros(self.layout.numel, dtype=precise, device=device)
        self._own, self._dtype = own, dtype
        self._ranks = range(len(layouts))
        self._others = [rank for rank in self._ranks if rank != own]
        self._share_bytes = [layout.numel * dtype.itemsize for layout in layouts]
        self.packed_sizes = self._sizes(own)
        room = _room(self._share_bytes[own])
        self.received_sizes = [0 if rank == own else room for rank in self._ranks]
        self._staging = staging
        self._memory: SharedMemory | None = None
        if staging.computes_on_host:
            self._memory = share(sum(self.packed_sizes))
        if self._memory is None:
            size = (sum(self.packed_sizes),)
            self.packed_bytes = staging.zeros(size, torch.uint8, device)
        else:
            self.packed_bytes = self._memory.bytes
        size = (sum(self.received_sizes),)
        self.received_bytes = staging.zeros(size, torch.uint8, device)
        # The kernels' side of both: the same tensors without staging.
        self._packed = staging.twin(self.packed_bytes)
        self._received = staging.twin(self.received_bytes)
        rows = torch.split(self._received, self.received_sizes)
        self._notes = [rows[rank][-_NOTE_BYTES:] for rank in self._others]
        parts = torch.split(self._packed, self.packed_sizes)
        self._own_notes = [parts[rank][-_NOTE_BYTES:] for rank in self._others]
        self._parts = [self._values(parts[rank], self._share_bytes[rank]) for rank in self._others]
        self._sources = [self._values(rows[rank], self._share_bytes[own]) for rank in self._ranks]
        self._mapped: list[Tensor | None] = []
        self._exchanges = 0
        if self._memory is not None:
            self._note(self._memory.ticket)
        self._runs = [layouts[rank].runs for rank in self._others]
        self._address = -1
        self._views: list[tuple[Tensor, Tensor]] = []
        self._own_views: list[Tensor] = []
        # Halved beforehand, as often as needed, a sum of finite values does not overflow. Powers of two
        # are exact, so that the mean is that of a sum divided by the number of ranks.
        self._scale = 2.0 ** -math.ceil(math.log2(len(layouts)))
        # Values of fewer bits would leave their range.
        self._packed_scale = self._scale if dtype == precise else 1.0

    def _sizes(self, rank: int) -> list[int]:
        """Return the bytes that a local rank packs for each of the local ranks, with their notes."""
        return [0 if to == rank else _room(self._share_bytes[to]) for to in self._ranks]

    def _values(self, data: Tensor, size: int) -> Tensor:
        return data[:size].view(self._dtype)

    def pack(self, bucket: Tensor) -> None:
        """Copy the shares of the other ranks of the node, one after the other.

        Args:
            bucket: ``[numel]``; it must not change before :meth:`average`.
        """
        # The views keep the buffer, so that no other can come to lie at its address.
        if bucket.data_ptr() != self._address:
            self._address = bucket.data_ptr()
            self._views = [
                (part[run.local : run.local + run.numel], _of(bucket, run))
                for part, runs in zip(self._parts, self._runs, strict=True)
                for run in runs
            ]
            self._own_views = [_of(bucket, run) for run in self.layout.runs]
        for part, view in self._views:
            torch.mul(view, self._packed_scale, out=part)
        self._staging.send(self._packed, self.packed_bytes)

    def average(self) -> None:
        """Average the share over the local ranks, in their order, into :attr:`mean`."""
        self._staging.receive(self.received_bytes, self._received)
        ranks, scale = len(self._ranks), self._scale / self._packed_scale
        if scale == 1:  # the sum of the first two in one pass
            first = 2
            if self._own < first:
                self._add_own(self._sources[1 - self._own])
            else:
                torch.add(self._sources[0], self._sources[1], out=self.mean)
        else:
            first = 0
            self.mean.zero_()
        for rank in self._ranks[first:]:
            if rank == self._own:
                self._add_own(self.mean)
            else:
                self.mean.add_(self._sources[rank], alpha=scale)
        if ranks * self._scale != 1:
            self.mean.div_(ranks * self._scale)
        self._exchanges += 1
        if self._exchanges == 1:
            self._map()
        elif self._exchanges == 2:
            self._settle()

    def _add_own(self, others: Tensor) -> None:
        """Write the sum of other ranks and of this rank's bucket to the mean."""
        for run, own in zip(self.layout.runs, self._own_views, strict=True):
            place = slice(run.local, run.local + run.numel)
            torch.add(others[place], own, alpha=self._scale, out=self.mean[place])

    def _note(self, note: bytes) -> None:
        for own in self._own_notes:
            own[: len(note)] = torch.tensor(list(note), dtype=torch.uint8)

    def _map(self) -> None:
        """Map the memory of the other ranks, and note the success for them."""
        if not self._staging.computes_on_host:
            return
        self._mapped = [open_ticket(bytes(note[:TICKET_BYTES].tolist())) for note in self._notes]
        has_all = self._memory is not None and all(one is not None for one in self._mapped)
        self._note(bytes([has_all]))

    def _settle(self) -> None:
        """Read from the memory of the other ranks from now on, if all ranks can."""
        if not self._staging.computes_on_host:
            return
        if self._memory is not None:
            self._memory.seal()
        mapped, self._mapped = self._mapped, []
        if not all(bool(note[0]) for note in (*self._notes, *self._own_notes)):
            return
        for rank, memory in zip(self._others, mapped, strict=True):
            assert memory is not None
            part = torch.split(memory, self._sizes(rank))[self._own]
            self._sources[rank] = self._values(part, self._share_bytes[self._own])
        self._sources[self._own] = self.mean[:0]
        self._notes.clear()
        self.packed_sizes = self.received_sizes = [1] * len(self._ranks)
        self.packed_bytes, self.received_bytes = torch.zeros(2, len(self._ranks), dtype=torch.uint8)
        self._received = self.received_bytes
        self.is_shared = True

    def share_of(self, preconditioner: Preconditioner | None) -> Preconditioner | None:
        """Return the second moments of this rank's share.

        Args:
            preconditioner: Those of the whole parameters.
        """
        if preconditioner is None:
            return None
        moments: list[Tensor | None] = [
            None if moment is None else moment[:0] for moment in preconditioner.second_moments
        ]
        for run in self.layout.runs:
            moment = preconditioner.second_moments[run.slot]
            if moment is not None:
                moments[run.slot] = moment[run.offset : run.offset + run.numel]
        return Preconditioner(tuple(moments))


def _of(bucket: Tensor, run: Run) -> Tensor:
    return bucket[run.start : run.start + run.numel]


def _room(share_bytes: int) -> int:
    """Return the bytes of a share and its note, aligned for the next one."""
    return -(-share_bytes // _ALIGN_BYTES) * _ALIGN_BYTES + _NOTE_BYTES
