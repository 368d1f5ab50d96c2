"""Values of the exchange for loggers such as TensorBoard, and a line about it for progress bars."""

from __future__ import annotations

import math
import struct
from typing import Any

from effadam_hook.exchange.collectives import device_of
from effadam_hook.exchange.waiting import gather_bytes
from effadam_hook.state import EfficientAdamState

__all__ = ["exchange_line", "exchange_values", "log_exchange"]

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


def exchange_line(state: EfficientAdamState) -> str:
    """Describe the last exchange in a few words; a collective operation, and waits for the device.

    An exchange begins on a rank with its first bucket, and ends on all ranks at about the same time.
    The rank with the shortest one was therefore the last to begin, and the others have waited for it.

    Args:
        state: The state.

    Returns:
        Text such as ``"7.73x fewer bytes, exchange 40.1 ms, of which 12.3 ms waiting for rank 1"``, the
        same on all ranks. The time is that of the longest exchange; a wait below a tenth of it is left
        out.

    Example:
        >>> for step, batch in enumerate(bar := tqdm(batches)):
        ...     ...
        ...     if step % 10 == 0:
        ...         bar.set_postfix_str(exchange_line(state))
    """
    stats, session = state.stats(), state.session
    own = struct.pack("dd", stats["exchange_s"], stats["ratio"])
    with session.connection.waiting("exchange_line()"):
        group = session.group
        rows = gather_bytes(own, group, device_of(group), everywhere=True)
    times, ratios = zip(*(struct.unpack("dd", row) for row in rows), strict=True)
    longest, shortest = max(times), min(times)
    text = f"{ratios[0]:.2f}x fewer bytes, exchange {1000 * longest:.1f} ms"
    if longest - shortest < longest / 10 or len(times) == 1:
        return text
    waited = f"{1000 * (longest - shortest):.1f} ms waiting for rank {times.index(shortest)}"
    return f"{text}, of which {waited}"


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
