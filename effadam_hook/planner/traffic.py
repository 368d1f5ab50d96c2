"""Traffic of a method: parameter sizes, DDP buckets, payload sizes, and collectives.

With M nodes of G ranks, N = M G, a payload of U bytes up and D bytes down, and S bytes of gradients,
the network card of the busiest node carries, in its busier direction:

====================  ==========================  ===================================
method                up                          down
====================  ==========================  ===================================
dense ring            ``2 S (N-1)/N`` in total
``hierarchical``      ``U (M-1)/M``               ``D (M-1)/M``
``sharded``           ``U G (M-1)/M``             ``D (N-1)/N``
``rank0``             ``U (N-G)``, into rank 0    ``D G ⌈log2 M⌉``, out of the first node
====================  ==========================  ===================================

A ring of consecutive ranks crosses a card once in each direction, whatever the number of its ranks; an
all-to-all crosses it once for each of them. In ``hierarchical`` and ``sharded`` a node sends as many
bytes as it receives, so both legs use both directions of the card. In ``rank0`` the uplink fills one
direction and the downlink the other. Gloo broadcasts along a tree with rank 0 at its root. NCCL
forwards chunks from rank to rank, and the first node sends D bytes. ``D G ⌈log2 M⌉`` holds for powers
of two; other numbers are counted.

This module contains integers and floats only, no tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from effadam_hook.exchange.topology import HIERARCHICAL, TOPOLOGIES, Leg, Load
from effadam_hook.planner.method import Method
from effadam_hook.wire.blocks import USUAL_BLOCK, block_size_for
from effadam_hook.wire.layout import REPLICA_CHECK_BYTES, aligned
from effadam_hook.wire.node_shares import position_of
from effadam_hook.wire.parts import cut, part_numel
from effadam_hook.wire.quantizers import SCALE_BYTES, get_quantizer
from effadam_hook.wire.shares import share_of, turn_of, unit_of

__all__ = [
    "ALL_REDUCE",
    "ParameterSize",
    "all_reduce",
    "block_size_of",
    "legs_of",
    "make_buckets",
    "parts_of",
    "payload_bytes",
    "shares_of",
    "square_model",
    "unit_leg",
]

ALL_REDUCE = "all_reduce"
"""Name of the leg of a dense all-reduce."""

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


def block_size_of(parameters: Iterable[ParameterSize]) -> int:
    """Return the block size that the exchange of a model chooses.

    Args:
        parameters: Sizes of all trained parameters of the model.
    """
    return block_size_for([(p.numel // p.rows, p.numel) for p in parameters if p.rows and p.numel])


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
    bucket: Sequence[ParameterSize],
    quantizer: str,
    servers: int,
    block_size: int = USUAL_BLOCK,
    shares: int = 1,
) -> int:
    """Compute the size of a bucket's payload, the chunks of all servers together.

    Args:
        bucket: Parameter sizes of the bucket.
        quantizer: Name of the quantizer.
        servers: Number of servers, and so of chunks.
        block_size: Number of elements that share a scale.
        shares: Number of ranks of a node that divide the bucket among themselves.

    Returns:
        Bytes, equal to those of :func:`effadam_hook.wire.layout.lay_out_bucket`. If parameters times
        servers exceed 200,000, the chunks are assumed to be of equal size, as incomplete blocks are
        then distributed evenly.
    """
    return _payload_bytes(tuple(bucket), quantizer, servers, block_size, shares)


@lru_cache(maxsize=4096)
def _payload_bytes(
    bucket: tuple[ParameterSize, ...], quantizer: str, servers: int, block_size: int, shares: int
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
                size(each, share_of(each.numel, 0, unit, place, servers)[1])
                for at, each in enumerate(bucket)
                for unit in [unit_of(each.rows == 0, block_size)]
                for place in [position_of(server, turn_of(str(at)), servers, shares)]
            )
            for server in range(servers)
        )
    return servers * (aligned(longest) + REPLICA_CHECK_BYTES)


def legs_of(
    method: Method,
    bucket: Sequence[ParameterSize],
    nodes: int,
    on_nccl: bool = False,
    ranks_per_node: int = 1,
    block_size: int = USUAL_BLOCK,
) -> list[Leg]:
    """List the collectives of one bucket.

    Args:
        method: The method; its topology is not ``auto``, see :meth:`Method.on_nodes`.
        bucket: Parameter sizes of the bucket.
        nodes: Number of nodes.
        on_nccl: Whether NCCL carries the bytes. An all-reduce then takes ``2 log2 N`` rounds instead of
            ``2 (N-1)``, and the root of a broadcast sends its bytes once; see
            :class:`~effadam_hook.exchange.topology.Load`.
        ranks_per_node: Number of ranks of a node, which share its card.
        block_size: Number of elements that share a scale, of :func:`block_size_of`.

    Returns:
        The legs, in their order; an empty list for one rank or for ``none``.
    """
    numel = sum(parameter.numel for parameter in bucket)
    load = Load(numel * _ITEM_BYTES, 0.0, nodes, ranks_per_node, on_nccl)
    if load.world_size == 1 or method.kind == "none":
        return []
    if method.kind in ("dense", "cast"):
        return [all_reduce(load if method.kind == "dense" else _sized(load, numel * 2))]
    if method.kind == "powersgd":
        matrices = [p for p in bucket if p.rows]
        rank = method.rank
        sizes = [sum(p.numel for p in bucket if not p.rows)]
        sizes.append(sum(p.rows * min(rank, p.rows) for p in matrices))
        sizes.append(sum(p.numel // p.rows * min(rank, p.rows) for p in matrices))
        return [all_reduce(_sized(load, size * _ITEM_BYTES)) for size in sizes]
    topology = TOPOLOGIES[method.topology]
    servers = topology.servers_among(load.world_size)
    shares = shares_of(method, ranks_per_node)
    size = payload_bytes(bucket, method.quantizer, servers, block_size, shares)
    return topology.legs(replace(load, payload_bytes=size))


def shares_of(method: Method, ranks_per_node: int) -> int:
    """Return the number of ranks that divide the encoding of a bucket among themselves.

    Args:
        method: The method.
        ranks_per_node: Number of ranks of a node.
    """
    return ranks_per_node if method.topology == HIERARCHICAL else 1


def unit_leg(name: str, nodes: int, ranks_per_node: int, on_nccl: bool) -> Leg:
    """Describe a collective for one byte of gradients, or one byte of a whole payload.

    Args:
        name: Name of the leg.
        nodes: Number of nodes.
        ranks_per_node: Number of ranks of a node.
        on_nccl: See :func:`legs_of`.

    Returns:
        The leg; bytes are proportional to those of the gradients or of the payload.
    """
    load = Load(1.0, 1.0, nodes, ranks_per_node, on_nccl)
    if name == ALL_REDUCE:
        return all_reduce(load)
    legs = TOPOLOGIES[name.partition("/")[2]].legs(load)
    return next(leg for leg in legs if leg.name == name)


def all_reduce(load: Load) -> Leg:
    """Describe the dense all-reduce of the bytes of a bucket, around a ring.

    Args:
        load: Sizes and nodes.
    """
    n = load.world_size
    rounds = 2 * ((n - 1).bit_length() if load.on_nccl else n - 1)
    return load.around_ring(ALL_REDUCE, 2 * load.bucket_bytes * (n - 1) / n, rounds)


def _sized(load: Load, bucket_bytes: float) -> Load:
    return replace(load, bucket_bytes=bucket_bytes)
