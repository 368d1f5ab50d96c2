"""The buffers of one bucket inside a node: packed shares, the local ranks' parts, their mean."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from effadam_hook.exchange.staging import Staging
from effadam_hook.kernels.fusions import Preconditioner
from effadam_hook.wire.node_layout import NodeLayout

__all__ = ["NodeBuffers"]


class NodeBuffers:
    """Average the share of a rank over the ranks of its node.

    Args:
        layouts: The shares of all local ranks.
        own: Index of this rank in its node.
        dtype: The bucket's dtype.
        precise: The arithmetic's dtype.
        device: The bucket's device.
        staging: The memory of the collectives.

    Attributes:
        layout: This rank's share.
        mean: ``[share numel]``, the node's mean of it.
        packed_bytes: See :class:`~effadam_hook.exchange.bucket_job.NodeTransfer`.
        packed_sizes: Likewise.
        received_bytes: Likewise.
        received_sizes: Likewise.
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
        self.layout = layouts[own]
        numels = [layout.numel for layout in layouts]
        self._runs = [run for layout in layouts for run in layout.runs]
        self._staging = staging
        self._sent = staging.zeros((sum(numels),), dtype, device)
        self._packed = staging.twin(self._sent)
        self._received = staging.zeros((len(layouts), self.layout.numel), dtype, device)
        self._rows = staging.twin(self._received)
        self.mean = torch.zeros(self.layout.numel, dtype=precise, device=device)
        self.packed_bytes = self._sent.view(torch.uint8)
        self.packed_sizes = [numel * dtype.itemsize for numel in numels]
        self.received_bytes = self._received.view(-1).view(torch.uint8)
        self.received_sizes = [self.layout.numel * dtype.itemsize] * len(layouts)
        self._address = -1
        self._views: list[Tensor] = []

    def pack(self, bucket: Tensor) -> None:
        """Copy a bucket, share after share.

        Args:
            bucket: ``[numel]``.
        """
        # The views keep the buffer, so that no other can come to lie at its address.
        if bucket.data_ptr() != self._address:
            self._address = bucket.data_ptr()
            self._views = [bucket[run.start : run.start + run.numel] for run in self._runs]
        if self._views:
            torch.cat(self._views, out=self._packed)
            self._staging.send(self._packed, self._sent)

    def average(self) -> None:
        """Average what the local ranks have sent, in the order of the ranks, into :attr:`mean`."""
        self._staging.receive(self._received, self._rows)
        ranks = len(self._rows)
        # Halved beforehand, as often as needed, a sum of finite values does not overflow. Powers of two
        # are exact, so that the mean is that of a sum divided by the number of ranks.
        scale = 2.0 ** -math.ceil(math.log2(ranks))
        self.mean.zero_()
        for row in self._rows:
            self.mean.add_(row, alpha=scale)
        if ranks * scale != 1:
            self.mean.div_(ranks * scale)

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
