"""What a bucket exchanges: the gradient, the preconditioned gradient, or the Adam update.

The two-way exchange is the same for all of them; a mode only says what the kernels fuse with the
quantizer, and where the decoded result goes.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from effadam_hook.errors import EffAdamError
from effadam_hook.feedback.moments import MOMENTS
from effadam_hook.feedback.parameters import flat_view, shaped_view
from effadam_hook.kernels.fusions import ADAM_TERMS, AdamSource, Preconditioner
from effadam_hook.optim.efficient_adam import EfficientAdam
from effadam_hook.wire.layout import Piece, Slot

__all__ = [
    "GradientContent",
    "GradientMode",
    "Mode",
    "PreconditionedMode",
    "UpdateMode",
    "WeightMode",
]


class GradientContent:
    """What one bucket exchanges; this one, its gradient.

    Attributes:
        preconditioner: What the kernels divide blocks by, if anything.
        adam: What turns the gradient into an update, if anything.
        averages_first: Whether the gradient itself is averaged, uncompressed, before it is encoded.
        sends_weights: Whether servers apply the mean themselves and send weights down, not means.
        progress: A digest of the optimizer's steps, which ranks compare.
    """

    preconditioner: Preconditioner | None = None
    adam: AdamSource | None = None
    averages_first = False
    sends_weights = False
    progress = 0

    def begin(self) -> None:
        """Prepare a step; called by the hook before the exchange."""

    def target(self, bucket: Tensor) -> Tensor:
        """Where the decoded result goes.

        Args:
            bucket: ``[numel]``, DDP's buffer.

        Returns:
            A tensor ``[numel]``.
        """
        return bucket

    def finish(self, bucket: Tensor) -> None:
        """Hand over the decoded result.

        Args:
            bucket: ``[numel]``, DDP's buffer.
        """

    def withdraw(self, parameter: Tensor) -> None:
        """Drop the result for a parameter that no rank used, as DDP does with its gradient.

        Args:
            parameter: One of the bucket's.
        """

    def apply_on_server(
        self, mean: Tensor, residual: Tensor | None, pieces: Sequence[Piece]
    ) -> None:
        """With :attr:`sends_weights`: turn the mean update of a chunk into its new weights, in place.

        Args:
            mean: ``[chunk numel]``, the workers' mean.
            residual: ``[chunk numel]``, what the weights that all ranks hold lack of the server's.
            pieces: Where the chunk's elements belong.
        """


class GradientMode:
    """Drop-in: the gradient of any optimizer."""

    name = "gradient"
    units = "gradients"  # of the residuals
    server_sign = 1  # with which a server's residual counts as a worker's
    scales_with_loss = True
    max_grad_norm: float | None = None
    generation = 0

    def wire_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which uncompressed elements travel.

        Args:
            dtype: The bucket's.

        Returns:
            The bucket's dtype for gradients; the moments' for updates.
        """
        return dtype

    def content(
        self, parameters: Sequence[Tensor], slots: Sequence[Slot], dtype: torch.dtype
    ) -> GradientContent:
        """What a bucket exchanges.

        Args:
            parameters: Its parameters.
            slots: Their places.
            dtype: The bucket's dtype.

        Returns:
            The content, kept for as long as the bucket keeps its parameters.
        """
        return GradientContent()

    def begin_backward(self, joins: bool) -> None:
        """Prepare for the buckets of a backward; called when the first one comes.

        Args:
            joins: Whether the model is under ``join()``.
        """

    def averaged(self, parameters: Sequence[Tensor], buffer: Tensor) -> list[Tensor]:
        """Note that a bucket's gradient is averaged densely this time.

        Args:
            parameters: Its parameters.
            buffer: ``[numel]``, the bucket, which will hold the mean; or a sparse tensor.

        Returns:
            Further tensors to average, so that dense steps leave all ranks equal.
        """
        return []

    def describe(self) -> dict[str, Any]:
        """What else the ranks must agree on, as plain values."""
        return {}

    def progress(self) -> int:
        """A digest of the optimizer's steps, which must be the same on every rank."""
        return 0

    def notice_end_of_backward(self) -> None:
        """Called after a backward that exchanged, when DDP has written the gradients."""

    def end_without_backward(self) -> None:
        """Called when a rank that has run out of data under ``join()`` has exchanged all buckets."""

    def save(self) -> dict[str, dict[str, Any]]:
        """What this rank needs besides the residuals to continue.

        Returns:
            By parameter name, flat tensors and numbers.
        """
        return {}

    def load(self, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """Continue from what :meth:`save` returned, or from the mean of all ranks'.

        Args:
            saved: By parameter name.
        """


class PreconditionedMode(GradientMode):
    """The gradient in units of the root of the optimizer's second moment.

    Replicas are identical, and so is the second moment of their Adam: it costs nothing to send.

    Args:
        optimizer: A ``torch.optim.Adam`` or ``AdamW`` over the DDP model's parameters.
    """

    name = "preconditioned gradient"

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    def describe(self) -> dict[str, Any]:
        """The kind of optimizer and its settings."""
        return {"optimizer": type(self._optimizer).__name__, **_settings(self._optimizer)}

    def content(
        self, parameters: Sequence[Tensor], slots: Sequence[Slot], dtype: torch.dtype
    ) -> GradientContent:
        """A content that looks up the second moments at every step."""
        return _PreconditionedContent(self._optimizer, parameters, dtype)


class _PreconditionedContent(GradientContent):
    def __init__(
        self, optimizer: Optimizer, parameters: Sequence[Tensor], dtype: torch.dtype
    ) -> None:
        self._optimizer = optimizer
        self._parameters = list(parameters)
        self._dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def begin(self) -> None:
        moments = [self._moment(parameter) for parameter in self._parameters]
        known = any(moment is not None for moment in moments)
        self.preconditioner = Preconditioner(tuple(moments)) if known else None

    def _moment(self, parameter: Tensor) -> Tensor | None:
        state = self._optimizer.state.get(parameter)
        moment: Tensor | None = state.get("exp_avg_sq") if state else None
        return None if moment is None else flat_view(moment.to(self._dtype))


class UpdateMode(GradientMode):
    """Efficient-Adam as published: every worker's Adam update.

    Args:
        optimizer: The attached optimizer, which holds the moments and applies the result.
    """

    name = "update"
    units = "updates"
    scales_with_loss = False

    def __init__(self, optimizer: EfficientAdam) -> None:
        self.optimizer = optimizer
        self.max_grad_norm = optimizer.max_grad_norm
        # Parameters whose moments may differ between the ranks.
        self._differing: set[Tensor] = set(optimizer.state)
        self._generation = optimizer.generation
        self._joins = False

    def describe(self) -> dict[str, Any]:
        """The optimizer's settings."""
        optimizer = self.optimizer
        return {
            "second_moment": optimizer.second_moment,
            "refresh_every": optimizer.refresh_every,
            "max_grad_norm": optimizer.max_grad_norm,
            "bias_correction": optimizer.bias_correction,
            "schedule": repr(optimizer.schedule),
            "steps": _range({state["step"] for state in optimizer.state.values() if state}),
            **_settings(optimizer),
        }

    @property
    def generation(self) -> int:  # type: ignore[override]
        """Changes when the moments have been replaced, so that buckets adopt the new ones."""
        return self.optimizer.generation

    def wire_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Updates travel in the moments' dtype."""
        return torch.float64 if dtype == torch.float64 else torch.float32

    def content(
        self, parameters: Sequence[Tensor], slots: Sequence[Slot], dtype: torch.dtype
    ) -> GradientContent:
        """A content with this bucket's moments, laid out like the bucket."""
        return _UpdateContent(
            self.optimizer, self._differing, parameters, slots, dtype, self.wire_dtype(dtype)
        )

    def begin_backward(self, joins: bool) -> None:
        """Have the optimizer forget what was not applied."""
        self._joins = joins
        self.optimizer.begin_backward(joins)
        if self._generation != self.optimizer.generation:  # a state was loaded, perhaps each rank's
            self._generation = self.optimizer.generation
            self._differing.update(self.optimizer.state)

    def averaged(self, parameters: Sequence[Tensor], buffer: Tensor) -> list[Tensor]:
        """The first dense step after compressed ones averages the workers' moments too."""
        if buffer.is_sparse:
            raise EffAdamError(
                f"A bucket of shape {tuple(buffer.shape)} has a sparse gradient. In update mode "
                "gradients must be dense, as in torch.optim.Adam: use sparse=False in the embedding, "
                "or gradient mode with SparseAdam."
            )
        moments = []
        start = 0
        for parameter in parameters:
            mean = None
            if self._joins:
                mean = shaped_view(buffer[start : start + parameter.numel()], parameter)
            start += parameter.numel()
            self.optimizer.deliver_mean(parameter, mean)
            if parameter in self._differing:
                state = self.optimizer.state[parameter]
                moments += [state[key] for key in MOMENTS if key in state]
        self._differing.difference_update(parameters)
        return moments

    def save(self) -> dict[str, dict[str, Any]]:
        """This rank's moments and steps."""
        return self.optimizer.save_moments()

    def load(self, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """Take up moments and steps, and have the buckets adopt them."""
        self.optimizer.load_moments(saved)
        self._differing.update(self.optimizer.state)

    def progress(self) -> int:
        """A digest of the steps of all parameters, in the optimizer's order."""
        states = [
            self.optimizer.state.get(p, {})
            for g in self.optimizer.param_groups
            for p in g["params"]
        ]
        return _digest([int(state.get("step", 0)) for state in states])

    def notice_end_of_backward(self) -> None:
        """Have the optimizer note what DDP has written."""
        self.optimizer.note_gradients()

    def end_without_backward(self) -> None:
        """Step at once, as the training loop of a rank out of data does not."""
        self.optimizer.step_without_backward()


class WeightMode(UpdateMode):
    """Quantized Adam: updates go up, the server keeps the weights and sends them down quantized.

    What the server's residual holds is the part of its weights that the quantized ones lack, so the
    workers compute gradients at ``Q_x(x)`` while ``x`` itself loses nothing.
    """

    name = "update up, weights down"
    units = "updates and weights"
    server_sign = -1  # weights against updates, which are subtracted from them

    def content(
        self, parameters: Sequence[Tensor], slots: Sequence[Slot], dtype: torch.dtype
    ) -> GradientContent:
        """A content whose servers apply the update."""
        return _WeightContent(
            self.optimizer, self._differing, parameters, slots, dtype, self.wire_dtype(dtype)
        )


class _UpdateContent(GradientContent):
    """One bucket's moments and update, and the terms of the current step."""

    def __init__(
        self,
        optimizer: EfficientAdam,
        differing: set[Tensor],
        parameters: Sequence[Tensor],
        slots: Sequence[Slot],
        bucket_dtype: torch.dtype,
        dtype: torch.dtype,
    ) -> None:
        self._optimizer = optimizer
        self._differing = differing
        self._parameters = list(parameters)
        self._slots = list(slots)
        numel = sum(slot.numel for slot in slots)
        device = parameters[0].device
        # A bucket of the moments' dtype can hold the update itself, and becomes the gradients.
        self._update: Tensor | None = None
        if self.sends_weights or bucket_dtype != dtype:
            self._update = torch.zeros(numel, dtype=dtype, device=device)
        flats = {key: torch.zeros(numel, dtype=dtype, device=device) for key in MOMENTS}
        for parameter, slot in zip(self._parameters, self._slots, strict=True):
            state = optimizer.init_state(parameter, slot.name)
            for key, flat in flats.items():
                view = shaped_view(flat[slot.start : slot.start + slot.numel], parameter)
                state[key] = view.copy_(state[key])
        self._address = -1
        self._results: dict[Tensor, Tensor] = {}
        terms = torch.zeros(len(slots), len(ADAM_TERMS), dtype=torch.float64, device="cpu")
        self.adam = AdamSource(flats["exp_avg"], flats["exp_avg_sq"], terms)

    def begin(self) -> None:
        assert self.adam is not None
        optimizer = self._optimizer
        self.averages_first = optimizer.averages(self._parameters)
        rows = [
            optimizer.prepare(parameter, slot.name, self.averages_first)
            for parameter, slot in zip(self._parameters, self._slots, strict=True)
        ]
        self.adam.terms.copy_(torch.tensor(rows, dtype=torch.float64, device="cpu"))
        self._differing.update(self._parameters)
        self.progress = _digest([optimizer.state[p]["step"] for p in self._parameters])

    def target(self, bucket: Tensor) -> Tensor:
        return bucket if self._update is None else self._update

    def finish(self, bucket: Tensor) -> None:
        # What is delivered is the result itself: DDP leaves ``.grad`` alone where no rank used the
        # parameter, whatever is in it.
        if self._update is not None:
            bucket.copy_(self._update)
        self._optimizer.deliver(self._views(self.target(bucket)))

    def withdraw(self, parameter: Tensor) -> None:
        self._optimizer.withdraw(parameter)

    def _views(self, result: Tensor) -> dict[Tensor, Tensor]:
        """By parameter, its stretch of the result, made once for a buffer that DDP hands over again."""
        # The views keep the buffer, so that no other can come to lie at its address.
        if result.data_ptr() != self._address:
            self._address = result.data_ptr()
            self._results = {
                parameter: shaped_view(result[slot.start : slot.start + slot.numel], parameter)
                for parameter, slot in zip(self._parameters, self._slots, strict=True)
            }
        return self._results


class _WeightContent(_UpdateContent):
    sends_weights = True

    def apply_on_server(
        self, mean: Tensor, residual: Tensor | None, pieces: Sequence[Piece]
    ) -> None:
        for piece in pieces:
            here = slice(piece.local, piece.local + piece.numel)
            parameter, slot = self._parameters[piece.slot], self._slots[piece.slot]
            keep = self._optimizer.keeps(parameter, slot.name)
            held = flat_view(parameter)[piece.offset : piece.offset + piece.numel]
            torch.sub(held.to(mean.dtype) * keep, mean[here], out=mean[here])
            if residual is not None:
                residual[here].mul_(keep)

    def finish(self, bucket: Tensor) -> None:
        assert self._update is not None
        for parameter, slot in zip(self._parameters, self._slots, strict=True):
            here = slice(slot.start, slot.start + slot.numel)
            bucket[here] = flat_view(parameter).to(self._update.dtype) - self._update[here]
        self._optimizer.deliver(self._views(self._update), replaces=True)


def _digest(steps: Sequence[int]) -> int:
    return zlib.crc32(array("q", map(int, steps)))


def _range(steps: set[int]) -> str:
    """The step counts of all parameters, as text."""
    if len(steps) < 2:
        return str(min(steps, default=0))
    return f"{min(steps)} to {max(steps)}"


def _settings(optimizer: Optimizer) -> dict[str, Any]:
    """What the parameter groups set, as text."""
    return {
        f"group {index}": {
            name: str(float(value) if isinstance(value, Tensor) else value)
            for name, value in group.items()
            if name != "params"
        }
        for index, group in enumerate(optimizer.param_groups)
    }


Mode = GradientMode
"""Any of the modes."""
