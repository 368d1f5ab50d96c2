"""Values of the exchange for loggers such as TensorBoard and Weights & Biases."""

from __future__ import annotations

import math
from typing import Any

from effadam_hook.state import EfficientAdamState

__all__ = ["exchange_values", "log_exchange"]

_OMITTED = ("steps", "dense_bytes")


def exchange_values(state: EfficientAdamState, prefix: str = "effadam/") -> dict[str, float]:
    """Return the values of :meth:`EfficientAdamState.stats` for a logger. Waits for the device.

    Args:
        state: The state.
        prefix: Prefix of the names.

    Returns:
        ``ratio``, ``uplink_bytes``, ``downlink_bytes``, ``worker_residual_norm``,
        ``server_residual_norm``, ``quantization_error`` and ``exchange_s`` of this rank, without those
        that are not finite, such as the error of a step whose gradient overflowed.
    """
    values = {name: float(v) for name, v in state.stats().items() if name not in _OMITTED}
    return {prefix + name: value for name, value in values.items() if math.isfinite(value)}


def log_exchange(
    writer: Any, state: EfficientAdamState, step: int, prefix: str = "effadam/"
) -> dict[str, float]:
    """Write the values of the exchange to a logger. Waits for the device.

    Call it on the rank that logs, between the backward and the next forward.

    Args:
        writer: A ``SummaryWriter`` of TensorBoard, a run of Weights & Biases, an ``Accelerator``, or
            another object with ``add_scalar(name, value, step)`` or ``log(values, step=step)``.
        state: The state.
        step: Step of the logger.
        prefix: Prefix of the names.

    Returns:
        The written values, see :func:`exchange_values`.

    Raises:
        TypeError: If the writer has neither method.

    Example:
        >>> writer = SummaryWriter()
        >>> log_exchange(writer, state, step)
    """
    values = exchange_values(state, prefix)
    if callable(add_scalar := getattr(writer, "add_scalar", None)):
        for name, value in values.items():
            add_scalar(name, value, step)
    elif callable(log := getattr(writer, "log", None)):
        log(values, step=step)
    else:
        raise TypeError(
            f"Invalid writer: {type(writer).__name__}. Must have add_scalar(name, value, step), as a "
            "SummaryWriter of TensorBoard, or log(values, step=step), as a run of Weights & Biases."
        )
    return values
