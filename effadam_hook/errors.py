"""Exceptions and warnings of this package.

Invalid arguments raise :class:`ValueError` or :class:`TypeError`. Errors between ranks, and between
a running program and a saved state, raise :class:`EffAdamError` or a subclass, so that a training
loop can distinguish them from its own errors.
"""

from __future__ import annotations

import sys
import warnings

__all__ = [
    "CommandError",
    "DisagreementError",
    "EffAdamError",
    "StateMismatchError",
    "UnsupportedBackendError",
    "UserCodeError",
    "warn_caller",
]

_NOT_THE_USERS = ("effadam_hook", "lightning_plugin", "torch")


class EffAdamError(RuntimeError):
    """Error in the exchange between ranks, or in the use of its state."""


class UnsupportedBackendError(EffAdamError):
    """Backend of a process group that cannot exchange compressed buckets."""


class DisagreementError(EffAdamError):
    """Difference between the options, versions or models of the ranks."""


class StateMismatchError(EffAdamError):
    """Saved state that does not fit the running one, which is unchanged."""


class CommandError(RuntimeError):
    """Request that the ``effadam`` command or a benchmark cannot fulfil."""


class UserCodeError(RuntimeError):
    """Error in the user's code within the command; the cause is the original error."""


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, and name the line of the training program, outside this package and torch.

    Args:
        message: The warning.
        category: Its class.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_passed(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _is_passed(module: str) -> bool:
    return module.partition(".")[0] in _NOT_THE_USERS
