"""The contract of a mode, and of the content of one bucket.

The defaults of both base classes are those of gradients; other modes override them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from effadam_hook.kernels.fusions import AdamSource, Preconditioner
from effadam_hook.wire.layout import Piece, Slot
from effadam_hook.wire.node_layout import Run
from effadam_hook.wire.node_shares import NodeShare

__all__ = ["Content", "Mode"]


class Content:
    """The content of the exchange for one bucket; by default its gradient.

    Attributes:
        preconditioner: Second moments by whose root the kernels divide blocks, if any.
        adam: Moments that turn the gradient into an update, if any.
        averages_first: Whether the gradient itself is averaged, uncompressed, before it is encoded.
        sends_weights: Whether servers apply the mean themselves and send weights instead of means.
        progress: A digest of the optimizer's steps, which the ranks compare.
    """

    preconditioner: Preconditioner | None = None
    adam: AdamSource | None = None
    averages_first = False
    sends_weights = False
    progress = 0

    def begin(self) -> None:
        """Prepare a step; called by the hook before the exchange."""

    def target(self, bucket: Tensor) -> Tensor:
        """Return the destination of the decoded result.

        Args:
            bucket: ``[numel]``, DDP's buffer.

        Returns:
            A tensor ``[numel]``.
        """
        return bucket

    def finish(self, bucket: Tensor) -> None:
        """Pass on the decoded result; called after decoding.

        Args:
            bucket: ``[numel]``, DDP's buffer.
        """

    def withdraw(self, parameter: Tensor) -> None:
        """Drop the result for a parameter that no rank used, as DDP drops its gradient.

        Args:
            parameter: One of the bucket's parameters.
        """

    def apply_on_server(
        self, mean: Tensor, residual: Tensor | None, pieces: Sequence[Piece]
    ) -> None:
        """Turn the mean update of a chunk into new weights, in place; if :attr:`sends_weights`.

        Args:
            mean: ``[chunk numel]``, the mean of the workers.
            residual: ``[chunk numel]``, the server's weights minus those of the replicas.
            pieces: Positions of the chunk's elements in their parameters.
        """


class Mode:
    """The content of the exchange for a whole model.

    Attributes:
        name: The name, for summaries and for the comparison between ranks.
        units: The units of the residuals, for checkpoints.
        server_sign: The sign of a server's residual relative to a worker's: -1 if workers send updates
            and servers send weights, from which updates are subtracted; 1 otherwise.
        scales_with_loss: Whether residuals are in units of the scaled loss.
        max_grad_norm: Bound on the 2-norm of a worker's gradient; None for no bound.
        generation: A number that changes when buckets must create their contents anew.
        undivided: The option or optimizer that makes every rank encode whole buckets; empty if the
            ranks of a node can divide the encoding among themselves, as "hierarchical" requires.
    """

    name = "gradient"
    units = "gradients"
    server_sign = 1
    scales_with_loss = True
    max_grad_norm: float | None = None
    generation = 0
    undivided = ""

    def wire_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype in which uncompressed elements travel.

        Args:
            dtype: The dtype of the bucket.

        Returns:
            The same dtype for gradients, that of the moments for updates.
        """
        return dtype

    def content(
        self,
        parameters: Sequence[Tensor],
        slots: Sequence[Slot],
        dtype: torch.dtype,
        runs: Sequence[Run],
    ) -> Content:
        """Create the content of a bucket.

        Args:
            parameters: The parameters of the bucket.
            slots: Their positions in it.
            dtype: The dtype of the bucket.
            runs: The elements that this rank encodes: all, or its share of them.

        Returns:
            The content, which is used as long as the bucket has these parameters.
        """
        return Content()

    def divide(self, share: NodeShare | None) -> None:
        """Follow the division of the encoding among the ranks of a node; called before any content.

        Args:
            share: This rank's share of the parameters; None for all of them.
        """

    def connect(self, workers: int, energy: float) -> None:
        """Follow the exchange; called before any content.

        Args:
            workers: Number of workers: of nodes, in the hierarchical topology.
            energy: The part of the energy of a normal distribution that both quantizers transmit.
        """

    def check_momentum(self, energy: float) -> None:
        """Warn of more momentum than few bits allow; called when compression begins.

        Args:
            energy: As of :meth:`connect`.
        """

    def begin_backward(self, joins: bool) -> None:
        """Prepare the buckets of a backward; called before the first of them.

        Args:
            joins: Whether the model is under ``join()``.
        """

    def begin_dense(self, parameters: Sequence[Tensor], buffer: Tensor) -> list[Tensor]:
        """Prepare a dense average of the gradient of a bucket.

        Args:
            parameters: The parameters of the bucket.
            buffer: ``[numel]``, the bucket, which will contain the mean; or a sparse tensor.

        Returns:
            Further tensors to average, so that all ranks are equal after the step.
        """
        return []

    def end_backward(self) -> None:
        """End a backward; called when DDP has written the gradients."""

    def end_without_backward(self) -> None:
        """End the exchange of all buckets on a rank that has run out of data under ``join()``."""

    def describe(self) -> dict[str, Any]:
        """Return the settings that must be equal on all ranks, as plain values."""
        return {}

    def progress(self) -> int:
        """Return a digest of the optimizer's steps, which must be equal on all ranks."""
        return 0

    def expect_saving(self) -> None:
        """Expect a plugin to save the state of the hook in every checkpoint, and do not warn."""

    def save(self) -> dict[str, dict[str, Any]]:
        """Return the state of this rank besides the residuals, for a checkpoint.

        Returns:
            By parameter name, flat tensors and numbers.
        """
        return {}

    def load(self, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """Resume from the result of :meth:`save`, or from the mean of those of all ranks.

        Args:
            saved: By parameter name.
        """
