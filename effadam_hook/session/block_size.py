"""The block size of one exchange: an option, that of a loaded state, or a rule."""

from __future__ import annotations

from effadam_hook.config import Config
from effadam_hook.feedback.parameters import ParameterTable
from effadam_hook.wire.blocks import USUAL_BLOCK, block_size_for

__all__ = ["BlockSize"]


class BlockSize:
    """Choose the block size of one exchange, the same on all ranks.

    Args:
        config: The options.
        parameters: The parameters of the model.
    """

    def __init__(self, config: Config, parameters: ParameterTable) -> None:
        self._config = config
        self._parameters = parameters
        self._followed: int | None = None
        self._chosen: int | None = None

    @property
    def value(self) -> int:
        """Return the number of elements that share a scale."""
        if self._config.block_size is not None:
            return self._config.block_size
        if self._followed is not None:
            return self._followed
        if not self._parameters.bound:
            return USUAL_BLOCK
        if self._chosen is None:
            self._chosen = block_size_for(self._parameters.rows(self._config))
        return self._chosen

    def value_after(self, saved: int, is_same_run: bool) -> int:
        """Return the block size with which a saved state continues, before the first bucket.

        Without the option, that of the saved state remains, so that training continues to the bit.

        Args:
            saved: Block size of the saved state.
            is_same_run: Whether the state is one of as many ranks.
        """
        return saved if self._config.block_size is None and is_same_run else self.value

    def follow(self, size: int) -> None:
        """Take the block size of a loaded state.

        Args:
            size: Result of :meth:`value_after`.
        """
        if self._config.block_size is None and size != self.value:
            self._followed = size

    def describe(self) -> str:
        """Describe the block size with its reason."""
        if self._config.block_size is not None:
            reason = ""
        elif self._followed is not None:
            reason = ", as the saved state"
        elif self._parameters.bound:
            reason = ", by the model's rows"
        else:
            reason = ", as the model's rows are not known without attach()"
        return f"blocks of {self.value}{reason}"
