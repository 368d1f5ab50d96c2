"""The buffers of one bucket inside a node: packed shares, the local ranks' parts, their mean.

On a CPU the ranks of a node read shares and payload chunks from one another's memory, see
:mod:`effadam_hook.session.node_memory`, and only meet over Gloo. They find out in the first two
exchanges of a bucket, in which shares are sent::

    first     shares, and the ticket of the memory in which this rank packs
    second    shares, and whether this rank has mapped the memory of all others
    others    one byte, if all ranks have mapped all memory; else shares

A rank with too many open files has no ticket. All ranks of the node then repeat the first exchange in
the next step, when other buckets have closed theirs; up to 64 times, as the files may be those of the
program.

They also share one payload, in the memory of the first of them: every rank receives the chunks of its
share into it, and all decode it from there.

A rank packs a bucket again only after the exchange, which ends after all ranks of the node have
averaged: they contribute to its last stage. It receives a payload again only after they have packed
once more, and thus have decoded the last one.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from effadam_hook.exchange.staging import Staging
from effadam_hook.kernels.fusions import Preconditioner
from effadam_hook.session.node_memory import TICKET_BYTES, SharedMemory, open_ticket, share
from effadam_hook.wire.node_layout import NodeLayout, Run

__all__ = ["MeanMemory", "NodeBuffers"]

_ALIGN_BYTES = 64
_NOTE_BYTES = 64
"""Bytes after each share, for a ticket or an answer."""
_LATER_AT = TICKET_BYTES
"""The byte of a note that a rank sets if it has too many open files for a ticket."""
_OFFER, _ANSWER, _OVER = range(3)
_MOST_OFFERS = 64


class MeanMemory:
    """Memory for the mean of one bucket at a time, which a stage averages and encodes at once.

    It is 1/G of the gradients less memory with G ranks a node, and remains in a processor's cache.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return ``[numel]``, elements that other buckets use too."""
        held = self._held.get((dtype, device))
        if held is None or held.numel() < numel:
            held = self._held[dtype, device] = torch.zeros(numel, dtype=dtype, device=device)
        return held[:numel]


class NodeBuffers:
    """Average the share of a rank over the ranks of its node.

    Args:
        layouts: The shares of all local ranks.
        own: Index of this rank in its node.
        dtype: The bucket's dtype.
        precise: The arithmetic's dtype.
        device: The bucket's device.
        staging: The memory of the collectives, where that is not shared.
        payload_shape: Chunks of the downlink payload, and their bytes.
        means: The memory of the mean; None for memory of its own.

    Attributes:
        layout: This rank's share.
        mean: ``[share numel]``, the node's mean of it; valid until the next bucket is averaged, unless
            :meth:`keep_mean` has been called.
        payload: ``[servers, stride_bytes]``, the downlink payload that the ranks share; None where they
            do not.
        served: See :class:`~effadam_hook.exchange.bucket_job.BucketJob`.
        packed_bytes: See :class:`~effadam_hook.exchange.bucket_job.NodeTransfer`.
        packed_sizes: Likewise.
        received_bytes: Likewise.
        received_sizes: Likewise.
        refusal: Why they do not, for messages; empty while that is open.
    """

    def __init__(
        self,
        layouts: Sequence[NodeLayout],
        own: int,
        dtype: torch.dtype,
        precise: torch.dtype,
        device: torch.device,
        staging: Staging,
        payload_shape: tuple[int, int] = (0, 0),
        means: MeanMemory | None = None,
    ) -> None:
        self.layout, self.refusal = layouts[own], ""
        self._shares_mean = means is not None
        self.mean = (means or MeanMemory()).take(self.layout.numel, precise, device)
        self._own, self._dtype = own, dtype
        self._ranks = range(len(layouts))
        self._others = [rank for rank in self._ranks if rank != own]
        self._share_bytes = [layout.numel * dtype.itemsize for layout in layouts]
        self._payload_shape = payload_shape
        self.payload: Tensor | None = None
        chunks = payload_shape[0] // len(layouts)
        self.served = staging.zeros((chunks, payload_shape[1]), torch.uint8, device)
        self.packed_sizes = self._sizes(own)
        room = _room(self._share_bytes[own])
        self.received_sizes = [0 if rank == own else room for rank in self._ranks]
        self._staging = staging
        self._runs = [layouts[rank].runs for rank in self._others]
        self._address = -1
        self._views: list[tuple[Tensor, Tensor]] = []
        self._own_views: list[Tensor] = []
        self.received_bytes = staging.zeros((sum(self.received_sizes),), torch.uint8, device)
        # The kernels' side: the same tensor without staging.
        self._received = staging.twin(self.received_bytes)
        rows = torch.split(self._received, self.received_sizes)
        self._notes = [rows[rank][-_NOTE_BYTES:] for rank in self._others]
        self._sources = [self._values(rows[rank], self._share_bytes[own]) for rank in self._ranks]
        # Halved beforehand, as often as needed, a sum of finite values does not overflow. Powers of two
        # are exact, so that the mean is that of a sum divided by the number of ranks.
        self._scale = 2.0 ** -math.ceil(math.log2(len(layouts)))
        # Values of fewer bits would leave their range.
        self._packed_scale = self._scale if dtype == precise else 1.0
        self._use(staging.zeros((sum(self.packed_sizes),), torch.uint8, device))
        self._memory: SharedMemory | None = None
        self._mapped: list[Tensor | None] = []
        self._turn, self._offers = _OFFER, 0
        if staging.computes_on_host:
            self._offer()
        else:
            self._turn, self.refusal = _OVER, "the gradients are on a GPU"

    def _sizes(self, rank: int) -> list[int]:
        """Return the bytes that a local rank packs for each of the local ranks, with their notes."""
        return [0 if to == rank else _room(self._share_bytes[to]) for to in self._ranks]

    def _payload_bytes(self, rank: int) -> int:
        """Return the bytes of the payload in the memory of a local rank."""
        return math.prod(self._payload_shape) if rank == 0 else 0

    def _values(self, data: Tensor, size: int) -> Tensor:
        return data[:size].view(self._dtype)

    @property
    def is_shared(self) -> bool:
        """Return whether the ranks read from one another's memory."""
        return self.payload is not None

    def _use(self, packed_bytes: Tensor) -> None:
        """Pack into a buffer from now on."""
        self.packed_bytes = packed_bytes
        self._packed = self._staging.twin(packed_bytes)
        parts = torch.split(self._packed, self.packed_sizes)
        self._own_notes = [parts[rank][-_NOTE_BYTES:] for rank in self._others]
        self._parts = [self._values(parts[rank], self._share_bytes[rank]) for rank in self._others]
        self._address = -1

    def keep_mean(self) -> None:
        """Use memory of its own for the mean from now on."""
        if self._shares_mean:
            self._shares_mean, self.mean = False, torch.zeros_like(self.mean)

    def pack(self, bucket: Tensor) -> None:
        """Copy the shares of the other ranks of the node, one after the other.

        Args:
            bucket: ``[numel]``; it must not change before :meth:`average`.
        """
        if self._turn == _OFFER and self._memory is None and not self.refusal:
            self._offer()  # again
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
        if self._turn == _OFFER:
            self._map()
        elif self._turn == _ANSWER:
            self._settle()

    def _add_own(self, others: Tensor) -> None:
        """Write the sum of other ranks and of this rank's bucket to the mean."""
        for run, own in zip(self.layout.runs, self._own_views, strict=True):
            place = slice(run.local, run.local + run.numel)
            torch.add(others[place], own, alpha=self._scale, out=self.mean[place])

    def _note(self, note: bytes) -> None:
        padded = torch.tensor(list(note.ljust(_NOTE_BYTES, b"\0")), dtype=torch.uint8, device="cpu")
        for own in self._own_notes:
            own.copy_(padded)

    def _offer(self) -> None:
        """Make memory, and note its ticket for the other ranks of the node."""
        packed_numel, self._offers = sum(self.packed_sizes), self._offers + 1
        try:
            self._memory = share(packed_numel + self._payload_bytes(self._own))
        except OSError as error:
            is_full = error.errno in (errno.EMFILE, errno.ENFILE) and self._offers < _MOST_OFFERS
            if not is_full:
                self.refusal = f"this system has no memory to share: {error.strerror}"
            self._note(bytes(_LATER_AT) + bytes([is_full]))
            return
        self._use(self._memory.bytes[:packed_numel])
        self._note(self._memory.ticket)

    def _map(self) -> None:
        """Map the memory of the other ranks, and note the success for them."""
        if any(bool(note[_LATER_AT]) for note in (*self._notes, *self._own_notes)):
            if self._memory is not None:  # its file may be the one that another bucket needs
                self._memory.seal()
                self._memory = None
            return
        self._mapped = [open_ticket(bytes(note[:TICKET_BYTES].tolist())) for note in self._notes]
        has_all = self._memory is not None and all(one is not None for one in self._mapped)
        self._note(bytes([has_all]))
        self._turn = _ANSWER

    def _settle(self) -> None:
        """Read from the memory of the other ranks from now on, if all ranks can."""
        self._turn = _OVER
        if self._memory is not None:
            self._memory.seal()
        mapped, self._mapped = self._mapped, []
        if not all(bool(note[0]) for note in (*self._notes, *self._own_notes)):
            self.refusal = self.refusal or (
                "a rank of the node cannot map the memory of another one, as between containers"
            )
            return
        assert self._memory is not None
        payload_bytes = self._memory.bytes[sum(self.packed_sizes) :]
        for rank, memory in zip(self._others, mapped, strict=True):
            assert memory is not None
            part = torch.split(memory, [*self._sizes(rank), self._payload_bytes(rank)])
            self._sources[rank] = self._values(part[self._own], self._share_bytes[self._own])
            if rank == 0:
                payload_bytes = part[-1]
        self._sources[self._own] = self.mean[:0]
        self.payload = payload_bytes.view(self._payload_shape)
        chunks = len(self.served)
        self.served = self.payload[self._own * chunks : (self._own + 1) * chunks]
        self._notes.clear()
        self.packed_sizes = self.received_sizes = [1] * len(self._ranks)
        self.packed_bytes, self.received_bytes = torch.zeros(
            2, len(self._ranks), dtype=torch.uint8, device="cpu"
        )
        self._received = self.received_bytes

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
