"""The exceptions of this package.

Wrong arguments raise the usual :class:`ValueError` or :class:`TypeError`. What goes wrong between
ranks, or between a running program and a saved state, raises :class:`EffAdamError` or one of its
children, so that a training loop can tell them from its own errors.
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
    """Something went wrong in the exchange between ranks, or in the use of its state."""


class UnsupportedBackendError(EffAdamError):
    """The process group's backend cannot carry compressed buckets."""


class DisagreementError(EffAdamError):
    """The ranks do not run the same configuration, versions or model."""


class StateMismatchError(EffAdamError):
    """A saved state does not fit the running one; the running one was left untouched."""


class CommandError(RuntimeError):
    """The ``effadam`` command or a benchmark cannot run as requested; the message is for the user."""


class UserCodeError(RuntimeError):
    """The user's own code raised within the command; the cause is the original error."""
