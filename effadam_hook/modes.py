"""What a bucket exchanges: the gradient, the preconditioned gradient, or the Adam update.

The two-way exchange is the same for all of them; a mode only says what the kernels fuse with the
quantizer, and where the decoded result goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from effadam_hook.errors import EffAdamError
from effadam_hook.kernels.sources import ADAM_TERMS, AdamSource, Preconditioner
from effadam_hook.layout import Piece, Slot
from effadam_hook.optim import MOMENTS, EfficientAdam
from effadam_hook.parameters import flat_view, shaped_view

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
    """

    preconditioner: Preconditioner | None = None
    adam: AdamSource | None = None
    averages_first = False
    sends_weights = False

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

    def averaged(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Note that a bucket's gradient is averaged densely this time.

        Args:
            parameters: Its parameters.

        Returns:
            Further tensors to average, so that dense steps leave all ranks equal.
        """
        return []

    def describe(self) -> dict[str, Any]:
        """What else the ranks must agree on, as plain values."""
        return {}

    def notice_end_of_backward(self) -> None:
        """Called after a backward that exchanged, when DDP has written the gradients."""

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
        # Parameters whose first moments may differ between the ranks.
        self._differing: set[Tensor] = set()

    def describe(self) -> dict[str, Any]:
        """The optimizer's settings."""
        optimizer = self.optimizer
        return {
            "second_moment": optimizer.second_moment,
            "refresh_every": optimizer.refresh_every,
            "max_grad_norm": optimizer.max_grad_norm,
            "bias_correction": optimizer.bias_correction,
            "schedule": repr(optimizer.schedule),
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
        self._differing.update(parameters)
        return _UpdateContent(self.optimizer, parameters, slots, dtype, self.wire_dtype(dtype))

    def averaged(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The first dense step after compressed ones averages the workers' moments too."""
        moments = []
        for parameter in parameters:
            self.optimizer.deliver_mean(parameter)
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

    def notice_end_of_backward(self) -> None:
        """Have the optimizer note what DDP has written."""
        self.optimizer.note_gradients()


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
        self._differing.update(parameters)
        return _WeightContent(self.optimizer, parameters, slots, dtype, self.wire_dtype(dtype))


class _UpdateContent(GradientContent):
    """One bucket's moments and update, and the terms of the current step."""

    def __init__(
        self,
        optimizer: EfficientAdam,
        parameters: Sequence[Tensor],
        slots: Sequence[Slot],
        bucket_dtype: torch.dtype,
        dtype: torch.dtype,
    ) -> None:
        self._optimizer = optimizer
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
        terms = torch.zeros(len(slots), len(ADAM_TERMS), dtype=torch.float64)
        self.adam = AdamSource(flats["exp_avg"], flats["exp_avg_sq"], terms)

    def begin(self) -> None:
        assert self.adam is not None
        rows = []
        steps = set()
        for parameter, slot in zip(self._parameters, self._slots, strict=True):
            step = self._optimizer.state[parameter]["step"] + 1
            steps.add(step)
            refresh = self._optimizer.refreshes(step)
            rows.append(self._optimizer.terms(parameter, slot.name, dense=refresh))
        if len(steps) > 1 and self._optimizer.second_moment == "shared":
            raise EffAdamError(
                "Parameters of one bucket are at different steps, and a shared second moment is "
                'refreshed for all of them at once. Use second_moment="local".'
            )
        self.averages_first = any(self._optimizer.refreshes(step) for step in steps)
        self.adam.terms.copy_(torch.tensor(rows, dtype=torch.float64))

    def target(self, bucket: Tensor) -> Tensor:
        return bucket if self._update is None else self._update

    def finish(self, bucket: Tensor) -> None:
        if self._update is not None:
            bucket.copy_(self._update)
        for parameter, slot in zip(self._parameters, self._slots, strict=True):
            update = None
            if self._update is not None:
                flat = self._update[slot.start : slot.start + slot.numel]
                update = shaped_view(flat, parameter)
            self._optimizer.deliver(parameter, update)


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
            weights = self._update[slot.start : slot.start + slot.numel]
            held = flat_view(parameter).to(weights.dtype)
            bucket[slot.start : slot.start + slot.numel] = held - weights
            self._optimizer.deliver(parameter, shaped_view(weights, parameter), replaces=True)


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
