"""Exceptions of this package.

Invalid arguments raise :class:`ValueError` or :class:`TypeError`. Errors between ranks, and between
a running program and a saved state, raise :class:`EffAdamError` or a subclass, so that a training
loop can distinguish them from its own errors.
"""

from __future__ import annotations

__all__ = [
    "CommandError",
    "DisagreementError",
    "EffAdamError",
    "StateMismatchError",
    "UnsupportedBackendError",
    "UserCodeError",
]


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
