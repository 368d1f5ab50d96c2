"""The check for gradients that are accumulated over several exchanges by mistake.

Without ``no_sync()`` every backward exchanges the content of ``.grad``. If the gradient of the
previous backward is still there, it is the mean of all ranks already, and is compressed a second
time. The result is not the accumulated gradient.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import Tensor

from effadam_hook.errors import warn_caller

__all__ = ["AccumulationCheck"]


class AccumulationCheck:
    """A comparison of one parameter's versions, at the start and the end of every exchanging backward.

    Gradients are accumulated if the weight has not been updated since the last exchange, and its
    gradient is the same tensor, changed only by one addition of backward. The versions of both
    tensors show this, and are read without waiting for a device.

    With ``gradient_as_bucket_view=True`` the versions are the same for a gradient that was set to
    None while the optimizer made no step, as when a GradScaler skips one. A parameter of the last
    bucket is therefore checked too: DDP has not restored its gradient yet when the first bucket
    arrives.
    """

    def __init__(self) -> None:
        self._warned = False
        self._weight: weakref.ref[Tensor] | None = None
        # The gradient itself, as its id may be reused; that of the smallest parameter of the bucket.
        self._grad: Tensor | None = None
        self._versions = (0, 0)
        self._last: weakref.ref[Tensor] | None = None

    def begin(self, parameters: Sequence[Tensor]) -> None:
        """Check for accumulation at the first bucket of a backward, and warn once.

        Args:
            parameters: The parameters of the bucket.
        """
        if self._warned:
            return
        weight = self._weight() if self._weight is not None else None
        if weight is None or all(weight is not parameter for parameter in parameters):
            self._weight = weakref.ref(min(parameters, key=Tensor.numel))
        elif self._grad is not None and weight.grad is self._grad:
            version, grad_version = self._versions
            last = self._last() if self._last is not None else None
            is_view = self._grad._is_view()
            kept = last.grad is not None if last is not None else not is_view
            # Views of one bucket count their changes together.
            written = len(parameters) if is_view else 1
            expected = (version, grad_version + written)
            # A zero gradient was filled with zeros after a skipped step, and this backward did not use
            # the parameter.
            if (
                kept
                and (weight._version, self._grad._version) == expected
                and bool(self._grad.any())
            ):
                self._warned = True
                warn_caller(
                    "Gradients of the last backward were still there, averaged over all ranks, and "
                    "are compressed a second time. To accumulate gradients, run all but the last "
                    "forward and backward under ddp_model.no_sync(); otherwise call zero_grad().",
                )
        self._grad = None

    def see_last(self, parameters: Sequence[Tensor]) -> None:
        """Remember a parameter of the last bucket of a backward.

        Args:
            parameters: The parameters of the bucket.
        """
        weight = self._weight() if self._weight is not None else None
        if all(weight is not parameter for parameter in parameters):
            self._last = weakref.ref(parameters[-1])
        else:
            self._last = None  # the first bucket is the last

    def end(self) -> None:
        """Record the versions, after DDP has written the gradients."""
        weight = self._weight() if self._weight is not None else None
        if weight is not None and weight.grad is not None and not self._warned:
            self._grad = weight.grad
            self._versions = (weight._version, weight.grad._version)
