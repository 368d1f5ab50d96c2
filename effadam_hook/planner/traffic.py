"""What travels: parameters, DDP's buckets of them, their payloads, and the legs that carry them.

With N ranks, a payload of U bytes up and D bytes down, and S bytes of gradients, the busiest rank's
link carries, in its busier direction:

====================  ==========================  ===========================
way                   up                          down
====================  ==========================  ===========================
dense ring            ``2 S (N-1)/N``, both ways together
``sharded``           ``U (N-1)/N``               ``D (N-1)/N``
``rank0``             ``U (N-1)``, into rank 0    ``D ⌈log2 N⌉``, out of rank 0
====================  ==========================  ===========================

In ``sharded`` every byte that goes out has one that comes in, so both legs share both directions of
the link; in ``rank0`` the uplink fills one direction and the downlink the other. Gloo broadcasts by a
tree that rank 0 is the root of; NCCL passes pieces on, and rank 0 sends D.

This module is integers and floats only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from effadam_hook.exchange.topology import TOPOLOGIES, Leg
from effadam_hook.planner.method import Method
from effadam_hook.wire.layout import (
    REPLICA_CHECK_BYTES,
    aligned,
    cut,
    part_numel,
    share_of,
    turn_of,
)
from effadam_hook.wire.quantizers import SCALE_BYTES, get_quantizer

__all__ = [
    "Parameter",
    "legs_of",
    "make_buckets",
    "parts_of",
    "payload_bytes",
    "square_model",
]

_FIRST_BUCKET_MB, _BUCKET_MB = 1.0, 25.0
_MB = 1 << 20
_ITEM_BYTES = 4
_MOST_SHARES = 200_000


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model.

    Attributes:
        numel: Number of elements.
        rows: Its first dimension; 0 for a parameter of at most one dimension, which travels exactly.
    """

    numel: int
    rows: int = 0


def square_model(numel: int, width: int = 1024) -> list[Parameter]:
    """A stand-in for a model of which only the size is known: square matrices without biases.

    Args:
        numel: Number of elements.
        width: Rows and columns of all but the last.

    Returns:
        Its parameters.
    """
    if numel < 1:
        raise ValueError(f"Invalid numel: {numel}. Must be 1 or more.")
    full, rest = divmod(numel, width * width)
    tail = [Parameter(rest, min(width, rest))] if rest else []
    return [Parameter(width * width, width)] * full + tail


def make_buckets(
    parameters: Sequence[Parameter], bucket_mb: float | None = None
) -> list[list[Parameter]]:
    """The buckets that DDP makes, in the order in which they become ready.

    Args:
        parameters: In the model's order.
        bucket_mb: DDP's ``bucket_cap_mb``; None is its default: a first bucket of 1 MiB, then 25.

    Returns:
        The parameters of each bucket. A bucket is closed by the parameter with which it is full.
    """
    if bucket_mb is not None and not bucket_mb > 0:
        raise ValueError(f"Invalid bucket_mb: {bucket_mb}. Must be above 0.")
    limit = (_FIRST_BUCKET_MB if bucket_mb is None else bucket_mb) * _MB
    buckets: list[list[Parameter]] = [[]]
    size = 0
    for parameter in reversed(parameters):
        if size >= limit:
            buckets.append([])
            size, limit = 0, (_BUCKET_MB if bucket_mb is None else bucket_mb) * _MB
        buckets[-1].append(parameter)
        size += parameter.numel * _ITEM_BYTES
    return buckets


def parts_of(
    method: Method, bucket: Sequence[Parameter], world_size: int, nccl: bool = False
) -> list[Sequence[Parameter]]:
    """What of a bucket travels together.

    Args:
        method: How it is averaged; only our exchange cuts buckets.
        bucket: Its parameters.
        world_size: Number of ranks.
        nccl: Whether NCCL carries them: there buckets travel whole.

    Returns:
        The parameters of each part.
    """
    if nccl or not method.is_ours:
        return [bucket]
    return [bucket[part] for part in cut([p.numel for p in bucket], part_numel(world_size))]


def payload_bytes(
    bucket: Sequence[Parameter], quantizer: str, servers: int, block_size: int = 256
) -> int:
    """Bytes of a bucket's payload for all servers together.

    Args:
        bucket: Its parameters.
        quantizer: Name of the quantizer.
        servers: How many chunks the payload has.
        block_size: Elements that share a scale.

    Returns:
        What :func:`effadam_hook.wire.layout.lay_out_bucket` would say. Where parameters times servers are very
        many, all servers count as equal: so many odd blocks spread evenly.
    """
    return _payload_bytes(tuple(bucket), quantizer, servers, block_size)


@lru_cache(maxsize=4096)
def _payload_bytes(
    bucket: tuple[Parameter, ...], quantizer: str, servers: int, block_size: int
) -> int:
    chosen = get_quantizer(quantizer)

    def size(parameter: Parameter, numel: int) -> int:
        if parameter.rows == 0 or chosen.is_raw:
            return numel * _ITEM_BYTES
        full, rest = divmod(numel, block_size)
        scales = (full + (rest > 0)) * SCALE_BYTES
        return scales + full * chosen.code_bytes(block_size) + chosen.code_bytes(rest)

    if servers * len(bucket) > _MOST_SHARES:
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
    method: Method, bucket: Sequence[Parameter], world_size: int, tree: bool = False
) -> list[Leg]:
    """The collectives of one bucket.

    Args:
        method: How it is averaged.
        bucket: Its parameters.
        world_size: Number of ranks.
        tree: Whether an all-reduce takes ``2 log2 N`` rounds, as NCCL's trees, and not ``2 (N-1)``, and
            a broadcast sends its bytes once.

    Returns:
        In their order; none for one rank, or without communication.
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
