"""Notices gradients that are accumulated over several exchanges, by mistake.

Without ``no_sync()`` every backward exchanges what is in ``.grad``. If the gradient of the backward
before is still there, it is the mean of all ranks already: it is compressed again, and what the ranks
send is mostly the same. The result is a gradient, but not the one that was meant.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence

from torch import Tensor

__all__ = ["AccumulationCheck"]


class AccumulationCheck:
    """Looks at one parameter at the beginning and at the end of every backward that exchanges.

    Its versions tell: the weight has not been updated since the last exchange, and its gradient is the
    same tensor, to which backward has added once and nothing else was done. Reading them costs nothing
    on any device.

    With ``gradient_as_bucket_view=True`` they tell the same of a gradient that was set to None, after
    which the optimizer made no step, as it does when a GradScaler skips one. So a parameter of the last
    bucket is looked at, too, whose gradient DDP has not put back yet when the first bucket comes.
    """

    def __init__(self) -> None:
        self._warned = False
        self._weight: weakref.ref[Tensor] | None = None
        # The gradient itself, as its id could come back; that of the smallest parameter there is.
        self._grad: Tensor | None = None
        self._versions = (0, 0)
        self._last: weakref.ref[Tensor] | None = None

    def begin(self, parameters: Sequence[Tensor]) -> None:
        """A backward's first bucket is here.

        Args:
            parameters: Those of the bucket.
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
            # A gradient that is zero was filled with zeros, after a step that was skipped, and the
            # backward did not use the parameter.
            if (
                kept
                and (weight._version, self._grad._version) == expected
                and bool(self._grad.any())
            ):
                self._warned = True
                warnings.warn(
                    "Gradients of the last backward were still there, averaged over all ranks, and "
                    "are compressed a second time. To accumulate gradients, run all but the last "
                    "forward and backward under ddp_model.no_sync(); otherwise call zero_grad().",
                    stacklevel=2,
                )
        self._grad = None

    def see_last(self, parameters: Sequence[Tensor]) -> None:
        """A backward's last bucket is here.

        Args:
            parameters: Those of the bucket.
        """
        weight = self._weight() if self._weight is not None else None
        if all(weight is not parameter for parameter in parameters):
            self._last = weakref.ref(parameters[-1])
        else:
            self._last = None  # the first bucket is the last

    def end(self) -> None:
        """DDP has written the result to the gradients."""
        weight = self._weight() if self._weight is not None else None
        if weight is not None and weight.grad is not None and not self._warned:
            self._grad = weight.grad
            self._versions = (weight._version, weight.grad._version)
