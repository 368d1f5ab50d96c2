"""Arithmetic of a method on a GPU that is not here, calculated from its rate of copying memory."""

from __future__ import annotations

from effadam_hook.planner.cluster import Speed
from effadam_hook.planner.method import Method
from effadam_hook.wire.quantizers import get_quantizer

__all__ = ["copying_speed"]

_CALL_S = 20e-6  # launches of one stage of a bucket
_MOMENTS_BYTES = 16  # two of Adam, read and written
# Passes of torch's hook over memory, before and after its collectives.
_POWERSGD_BYTES = (28, 24)


def copying_speed(method: Method, copy_bytes_s: float, ranks_per_node: int = 1) -> Speed:
    """Return the durations of kernels that move every byte once, in float32.

    A lower bound: kernels with many instructions, and the many small ones of PowerSGD, take longer.

    Args:
        method: The method.
        copy_bytes_s: Bytes per second that the device reads and writes while it copies.
        ranks_per_node: Number of ranks of a node, for the node's mean of the hierarchical topology.
    """
    if method.kind in ("none", "dense"):
        return Speed()
    if method.kind == "cast":  # to 16 bits, divided, and back
        return Speed(10 / copy_bytes_s, decode_s=6 / copy_bytes_s, call_s=_CALL_S)
    if method.kind == "powersgd":
        before, after = _POWERSGD_BYTES
        return Speed(before / copy_bytes_s, decode_s=after / copy_bytes_s, call_s=_CALL_S)
    payload = get_quantizer(method.quantizer).bits / 8
    moments = _MOMENTS_BYTES if method.kind == "update" else 0
    return Speed(
        encode_s=(12 + payload + moments) / copy_bytes_s,
        reduce_s=(8 + payload) / copy_bytes_s,
        reduce_payload_s=payload / copy_bytes_s,
        decode_s=(4 + payload) / copy_bytes_s,
        call_s=_CALL_S,
        pack_s=8 / copy_bytes_s,
        mean_s=(4 + 4 / ranks_per_node) / copy_bytes_s,
    )
