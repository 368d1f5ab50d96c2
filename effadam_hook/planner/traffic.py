"""Traffic of a method: parameter sizes, DDP buckets, payload sizes, and collectives.

With N ranks, a payload of U bytes up and D bytes down, and S bytes of gradients, the link of the
busiest rank carries, in its busier direction:

====================  ==========================  ===========================
method                up                          down
====================  ==========================  ===========================
dense ring            ``2 S (N-1)/N`` in total
``sharded``           ``U (N-1)/N``               ``D (N-1)/N``
``rank0``             ``U (N-1)``, into rank 0    ``D ⌈log2 N⌉``, out of rank 0
====================  ==========================  ===========================

In ``sharded`` a rank sends as many bytes as it receives, so both legs use both directions of the link.
In ``rank0`` the uplink fills one direction and the downlink the other. Gloo broadcasts along a tree
with rank 0 at its root. NCCL forwards chunks from rank to rank, and rank 0 sends D bytes.

This module contains integers and floats only, no tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from effadam_hook.exchange.topology import TOPOLOGIES, Leg
from effadam_hook.planner.method import Method
from effadam_hook.wire.layout import REPLICA_CHECK_BYTES, aligned
from effadam_hook.wire.parts import cut, part_numel
from effadam_hook.wire.quantizers import SCALE_BYTES, get_quantizer
from effadam_hook.wire.shares import share_of, turn_of

__all__ = [
    "ParameterSize",
    "legs_of",
    "make_buckets",
    "parts_of",
    "payload_bytes",
    "square_model",
]

_FIRST_BUCKET_MB, _BUCKET_MB = 1.0, 25.0
_MB = 1 << 20
_ITEM_BYTES = 4
_MAX_SHARES = 200_000


@dataclass(frozen=True)
class ParameterSize:
    """Size of one parameter of a model.

    Attributes:
        numel: Number of elements.
        rows: First dimension; 0 for a parameter with at most one dimension, which is sent uncompressed.
    """

    numel: int
    rows: int = 0


def square_model(numel: int, width: int = 1024) -> list[ParameterSize]:
    """Make the parameter sizes of a model of which only the total size is known.

    Args:
        numel: Total number of elements.
        width: Rows and columns of each matrix except the last.

    Returns:
        Square matrices without biases, and a smaller last matrix for the remainder.

    Raises:
        ValueError: If ``numel`` is less than 1.
    """
    if numel < 1:
        raise ValueError(f"Invalid numel: {numel}. Must be 1 or more.")
    full, rest = divmod(numel, width * width)
    tail = [ParameterSize(rest, min(width, rest))] if rest else []
    return [ParameterSize(width * width, width)] * full + tail


def make_buckets(
    parameters: Sequence[ParameterSize], bucket_mb: float | None = None
) -> list[list[ParameterSize]]:
    """Divide parameters into DDP's buckets.

    Args:
        parameters: Parameter sizes, in the model's order.
        bucket_mb: DDP's ``bucket_cap_mb``; None for its default, a first bucket of 1 MiB, then 25 MiB.

    Returns:
        The parameters of each bucket, in the order in which buckets become ready. A bucket ends with
        the parameter that fills it.

    Raises:
        ValueError: If ``bucket_mb`` is not positive.
    """
    if bucket_mb is not None and not bucket_mb > 0:
        raise ValueError(f"Invalid bucket_mb: {bucket_mb}. Must be above 0.")
    limit = (_FIRST_BUCKET_MB if bucket_mb is None else bucket_mb) * _MB
    buckets: list[list[ParameterSize]] = [[]]
    size = 0
    for parameter in reversed(parameters):
        if size >= limit:
            buckets.append([])
            size, limit = 0, (_BUCKET_MB if bucket_mb is None else bucket_mb) * _MB
        buckets[-1].append(parameter)
        size += parameter.numel * _ITEM_BYTES
    return buckets


def parts_of(
    method: Method, bucket: Sequence[ParameterSize], world_size: int, nccl: bool = False
) -> list[Sequence[ParameterSize]]:
    """Divide a bucket into the parts that are exchanged separately.

    Args:
        method: The method. Only methods of this project divide buckets.
        bucket: Parameter sizes of the bucket.
        world_size: Number of ranks.
        nccl: Whether the backend is NCCL, on which buckets are not divided.

    Returns:
        The parameters of each part.
    """
    if nccl or not method.is_effadam:
        return [bucket]
    return [bucket[part] for part in cut([p.numel for p in bucket], part_numel(world_size))]


def payload_bytes(
    bucket: Sequence[ParameterSize], quantizer: str, servers: int, block_size: int = 256
) -> int:
    """Compute the size of a bucket's payload, the chunks of all servers together.

    Args:
        bucket: Parameter sizes of the bucket.
        quantizer: Name of the quantizer.
        servers: Number of servers, and so of chunks.
        block_size: Number of elements that share a scale.

    Returns:
        Bytes, equal to those of :func:`effadam_hook.wire.layout.lay_out_bucket`. If parameters times
        servers exceed 200,000, the chunks are assumed to be of equal size, as incomplete blocks are
        then distributed evenly.
    """
    return _payload_bytes(tuple(bucket), quantizer, servers, block_size)


@lru_cache(maxsize=4096)
def _payload_bytes(
    bucket: tuple[ParameterSize, ...], quantizer: str, servers: int, block_size: int
) -> int:
    codec = get_quantizer(quantizer)

    def size(parameter: ParameterSize, numel: int) -> int:
        if parameter.rows == 0 or codec.is_raw:
            return numel * _ITEM_BYTES
        full, rest = divmod(numel, block_size)
        scales = (full + (rest > 0)) * SCALE_BYTES
        return scales + full * codec.code_bytes(block_size) + codec.code_bytes(rest)

    if servers * len(bucket) > _MAX_SHARES:
        longest = -(-sum(size(each, each.numel) for each in bucket) // servers)
    else:
        longest = max(
            sum(
                size(each, share_of(each.numel, turn_of(str(at)), block_size, server, servers)[1])
                for at, each in enumerate(bucket)
            )
            for server in range(servers)
        )
    return servers * (aligned(longest) + REPLICA_CHECK_BYTES)


def legs_of(
    method: Method, bucket: Sequence[ParameterSize], world_size: int, tree: bool = False
) -> list[Leg]:
    """List the collectives of one bucket.

    Args:
        method: The method.
        bucket: Parameter sizes of the bucket.
        world_size: Number of ranks.
        tree: Whether an all-reduce takes ``2 log2 N`` rounds, as NCCL's trees do, instead of
            ``2 (N-1)``, and whether the root of a broadcast sends its bytes once.

    Returns:
        The legs, in their order; an empty list for one rank or for ``none``.
    """
    n = world_size
    if n == 1 or method.kind == "none":
        return []
    numel = sum(parameter.numel for parameter in bucket)
    if method.kind in ("dense", "cast"):
        return [_all_reduce(numel * (_ITEM_BYTES if method.kind == "dense" else 2), n, tree)]
    if method.kind == "powersgd":
        matrices = [p for p in bucket if p.rows]
        rank = method.rank
        sizes = [sum(p.numel for p in bucket if not p.rows)]
        sizes.append(sum(p.rows * min(rank, p.rows) for p in matrices))
        sizes.append(sum(p.numel // p.rows * min(rank, p.rows) for p in matrices))
        return [_all_reduce(size * _ITEM_BYTES, n, tree) for size in sizes]
    topology = TOPOLOGIES[method.topology]
    size = payload_bytes(bucket, method.quantizer, topology.servers_among(n))
    return topology.legs(size, n, tree)


def _all_reduce(size: int, n: int, tree: bool) -> Leg:
    share = 2 * size * (n - 1) / n
    return Leg("all_reduce", share, share, 2 * ((n - 1).bit_length() if tree else n - 1))
