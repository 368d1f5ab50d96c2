"""The factor by which the loss, and with it gradients and residuals, are multiplied."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from effadam_hook.exchange.streams import streams_of
from effadam_hook.feedback.residuals import Residuals

__all__ = ["LossScale"]


class LossScale:
    """The scale of the residuals, which follows that of a ``GradScaler``.

    On a GPU the scale stays there: reading it would make the host wait for the backward. Residuals
    are multiplied in every step, mostly by 1.
    """

    def __init__(self) -> None:
        self._value: Tensor | None = None
        self._one: Tensor | None = None

    @property
    def value(self) -> float:
        """Return the scale. Waits for the device."""
        return 1.0 if self._value is None else float(self._value)

    def reset(self) -> None:
        """Return to 1, for residuals in units of the unscaled loss."""
        self._value = None

    def follow(
        self, scaler: torch.amp.GradScaler, device: torch.device, residuals: Iterable[Residuals]
    ) -> None:
        """Multiply residuals by the change of the scale, without waiting for a device.

        A scale that is not positive and finite changes nothing.

        Args:
            scaler: The scaler.
            device: The device of the residuals.
            residuals: The residuals, which saturate where they overflow, as sums in the kernels do.
        """
        if self._one is None:
            self._one = torch.ones((), dtype=torch.float64, device=device)
        before = self._one if self._value is None else self._value
        scale = scaler.scale(self._one)
        scale = torch.where((scale > 0) & scale.isfinite(), scale, before)
        factor = scale / before
        self._value = scale
        if streams_of(device) is None and float(factor) == 1:
            return
        for each in residuals:
            each.multiply(factor)
