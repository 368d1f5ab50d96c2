"""Typed access to the values of a saved state, with one error for every wrong value."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from effadam_hook._version import STATE_VERSION, __version__
from effadam_hook.errors import StateMismatchError
from effadam_hook.feedback.checksum import CHECKSUM_KEY, MOST_BITS, checksum_of, foreign_entry
from effadam_hook.feedback.moments import MOMENTS, check_moments

__all__ = ["StateReader", "check_version", "reject"]

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


class StateReader:
    """Read the values of a saved state, each by its key and its rule.

    Values are checked before the checksum is compared, so that a message can name the wrong one.

    Args:
        saved: Object to read.
        keys: Keys that it must have.

    Raises:
        StateMismatchError: If it is not a saved state, or a newer version of the package wrote it. All
            methods raise it too, if a value is missing, of the wrong type or out of range.
    """

    def __init__(self, saved: Any, keys: Collection[str]) -> None:
        if isinstance(saved, Mapping) and "version" in saved:
            check_version(saved["version"])
        if not isinstance(saved, Mapping) or not saved.keys() >= set(keys):
            raise StateMismatchError(
                "This is no saved state of EfficientAdamState: it must be the dictionary that "
                f"state_dict() returns, with the keys {', '.join(sorted(keys))}."
            )
        foreign = foreign_entry(saved)
        if foreign is not None:
            reject(*foreign, "a tensor or a plain value")
        self._saved = saved
        self._damage = _damage_of(saved)

    def check_damage(self) -> None:
        """Raise an error if the contents do not have their checksum."""
        if self._damage:
            raise StateMismatchError(self._damage)

    def has(self, key: str) -> bool:
        """Return whether the state has an optional value."""
        return key in self._saved

    def reject(self, key: str, value: object, rule: str) -> NoReturn:
        """Raise the error for a value that :meth:`EfficientAdamState.state_dict` cannot have written.

        Args:
            key: Key of the value, with dots between the levels.
            value: Value that was read.
            rule: Description of valid values, after "must be".
        """
        reject(key, value, rule, self._damage)

    def integer(self, key: str, least: int = 0) -> int:
        """Return an integer that is not less than ``least``."""
        return self._integer(key, self._saved[key], least)

    def text(self, key: str, choices: Collection[str] = ()) -> str:
        """Return a string, one of ``choices`` if there are any."""
        value = self._saved[key]
        if not isinstance(value, str) or (choices and value not in choices):
            rule = f"one of {', '.join(map(repr, choices))}" if choices else "a text"
            self.reject(key, value, rule)
        return value

    def table(self, key: str) -> Mapping[str, Any]:
        """Return a dictionary with names as keys."""
        value = self._saved[key]
        if not isinstance(value, Mapping):
            self.reject(key, value, "a dictionary")
        for name in value:
            if not isinstance(name, str):
                self.reject(f"the key of {key}", name, "a name")
        return value

    def integers(self, key: str, names: Collection[str]) -> dict[str, int]:
        """Return a dictionary of integers of 0 or more for exactly these names."""
        table = self.table(key)
        if table.keys() != set(names):
            shown = ", ".join(sorted(names)) or "none"
            self.reject(f"the names of {key}", sorted(table), f"exactly {shown}")
        return {name: self._integer(f"{key}.{name}", value, 0) for name, value in table.items()}

    def partition(self, key: str, count: int) -> tuple[tuple[int, ...], ...]:
        """Return lists of integers that hold 0 to ``count - 1``, each once, with equal lengths."""
        value = self._saved[key]
        is_nested = isinstance(value, (list, tuple)) and all(
            isinstance(entry, (list, tuple)) for entry in value
        )
        members = [member for entry in value for member in entry] if is_nested else []
        is_whole = all(type(member) is int for member in members)
        if not is_whole or sorted(members) != list(range(count)) or len(set(map(len, value))) > 1:
            self.reject(key, value, f"lists of equal lengths of the ranks 0 to {count - 1}")
        return tuple(tuple(entry) for entry in value)

    def residuals(self, key: str) -> dict[str, Tensor]:
        """Return a dictionary of vectors, the residuals of one side."""
        table = self.table(key)
        return {name: self._vector(f"{key} residual", name, value) for name, value in table.items()}

    def moments(self, key: str) -> dict[str, Mapping[str, Any]]:
        """Return a dictionary of the moments and plain values of parameters."""
        table = self.table(key)
        for name, entry in table.items():
            if not isinstance(entry, Mapping):
                self.reject(f"{key}.{name}", entry, "a dictionary")
            try:
                check_moments(name, entry)
            except StateMismatchError as error:
                raise self._error(str(error)) from error
            for moment in MOMENTS:
                self._vector(moment, name, entry[moment])
        return dict(table)

    def _integer(self, key: str, value: Any, least: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            self.reject(key, value, f"an integer of {least} or more")
        return value

    def _vector(self, what: str, name: str, value: Any) -> Tensor:
        if not isinstance(value, Tensor) or value.ndim != 1 or not value.is_floating_point():
            raise self._error(
                f"The saved {what} of {name!r} must be a one-dimensional floating tensor."
            )
        if not bool(torch.isfinite(value).all()):
            raise self._error(
                f"The saved {what} of {name!r} holds a NaN or an infinity, which would remain in all "
                "later steps. Use an earlier checkpoint."
            )
        return value

    def _error(self, message: str) -> StateMismatchError:
        return StateMismatchError(f"{message} {self._damage}".rstrip())


def check_version(version: Any) -> None:
    """Check the version of a saved state.

    Args:
        version: Value of the key ``"version"``.

    Raises:
        StateMismatchError: If it is no version, or a newer one than this package reads.
    """
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        reject("version", version, "an integer of 1 or more")
    if version > STATE_VERSION:
        raise StateMismatchError(
            f"The saved state has version {version}. Must be at most {STATE_VERSION}, which is what "
            f"effadam-hook {__version__} reads: install the version of the package that wrote it, or "
            "a newer one, or begin without a state."
        )


def reject(key: str, value: object, rule: str, damage: str = "") -> NoReturn:
    """Raise the error for a value that ``state_dict()`` cannot have written.

    Args:
        key: Key of the value, with dots between the levels.
        value: Value that was read.
        rule: Description of valid values, after "must be".
        damage: Further sentence for the message.
    """
    is_long = isinstance(value, int) and value.bit_length() > MOST_BITS
    shown = f"an integer of more than {MOST_BITS} bits" if is_long else _SHORT.repr(value)
    message = (
        f"The saved state has {key} = {shown}, which state_dict() never writes: it must be {rule}. The "
        "state is damaged: use another checkpoint."
    )
    raise StateMismatchError(f"{message} {damage}".rstrip())


def _damage_of(saved: Mapping[str, Any]) -> str:
    """Describe a wrong checksum; empty if it is right."""
    held, own = saved.get(CHECKSUM_KEY), None
    if saved["version"] > 1 or CHECKSUM_KEY in saved:  # states of version 1 have none
        own = checksum_of(saved)
    if held == own:
        return ""
    return (
        "The saved state is damaged: its contents, in value and dtype, are not those that "
        f"state_dict() returned. Its checksum is {held!r}, theirs is {own}. Use another checkpoint."
    )
