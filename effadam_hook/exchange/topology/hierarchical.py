"""Topology "hierarchical": a dense mean inside the node, a quantized exchange between nodes.

The ranks of a node share its network card, which a flat all-to-all crosses once for each rank. Here
every rank of a node handles its share of the bucket, and each element crosses the card once in each
direction. With M nodes of G ranks, rank g of node m:

1. receives the other local ranks' gradients for share g and averages them ("node mean"); on a CPU it
   reads them from shared memory, and the ranks only meet;
2. encodes the mean of its share, with the worker residual, and exchanges chunks with the M ranks of
   equal g on the other nodes ("uplink");
3. reduces chunk ``g * M + m`` as its server and exchanges the result with the same ranks ("downlink");
4. exchanges the payload chunks of its share for those of the other local ranks ("node gather"); with
   shared memory all ranks receive into one payload, and only meet;
5. decodes the whole bucket.

The worker of the algorithm is the node: N is M, and both residuals of a rank cover its share only.
Results are those of "sharded" on M ranks that hold the nodes' mean gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from effadam_hook.exchange.bucket_job import BucketJob
from effadam_hook.exchange.collectives import Group, all_gather_flat, all_to_all_flat
from effadam_hook.exchange.topology.leg import Leg, Load
from effadam_hook.exchange.topology.node_table import NodeTable
from effadam_hook.exchange.topology.sharded import Sharded
from effadam_hook.exchange.topology.topology import Stage, Topology, decode, encode, reduce

__all__ = ["Hierarchical"]


class Hierarchical(Topology):
    """As many servers as ranks, and as many workers as nodes.

    Args:
        rank: This process's rank in the group.
        world_size: The group's size.
        table: The nodes: at least two, with at least two ranks each.
    """

    name = "hierarchical"
    route_stage = 1

    def __init__(self, rank: int, world_size: int, table: NodeTable) -> None:
        super().__init__(rank, world_size)
        node, local = table.locate(rank)
        nodes = len(table.nodes)
        self.shares, self.share = table.ranks_per_node, local
        self.serves = local * nodes + node
        self.worker_ranks = self._peers = table.peers_of(rank)
        self.server_ranks = [ranks[share] for share in range(self.shares) for ranks in table.nodes]
        self._node = table.node_of(rank)
        self._between = Sharded(node, nodes)

    @classmethod
    def servers_among(cls, world_size: int) -> int:
        """Return the number of ranks."""
        return world_size

    @classmethod
    def legs(cls, load: Load) -> list[Leg]:
        """Describe the collectives inside a node and between nodes; see :class:`Topology`."""
        nodes, ranks = load.nodes, load.ranks_per_node
        card = load.payload_bytes * (nodes - 1) / nodes
        others = (ranks - 1) / ranks
        return [
            Leg("mean/hierarchical", 0, 0, 1, ranks - 2, load.bucket_bytes * others * load.on_nccl),
            Leg("up/hierarchical", card, card, 1, nodes - 2),
            Leg("down/hierarchical", card, card, 1, nodes - 2),
            Leg("gather/hierarchical", 0, 0, 1, ranks - 2, load.payload_bytes * others),
        ]

    @property
    def stages(self) -> Sequence[Stage]:
        """The stages of a bucket, in their order."""
        node, peers = self._node, self._peers
        return (
            Stage("pack", _pack, "node mean", _start_node_mean, ranks=node),
            Stage(
                "encode",
                encode,
                "uplink",
                self._start_uplink,
                prepare=_average,
                averages_first=True,
                ranks=peers,
            ),
            Stage("reduce", reduce, "downlink", self._start_downlink, ranks=peers),
            Stage("gather", None, "node gather", _start_node_gather, ranks=node),
            Stage("decode", decode),
        )

    def measure_route(self, group: Group) -> None:
        """Choose the route of the downlink between nodes; see :class:`Topology`."""
        self._between.measure_route(group)
        self.route = self._between.route

    def outgoing(self, downlink: Tensor) -> Tensor:
        """Return the buffer of the exchange between nodes; see :class:`Topology`."""
        return self._between.outgoing(downlink)

    def send_up(self, payload: Tensor, received: Tensor, group: Group) -> dist.Work | None:
        """Start the uplink between nodes; see :class:`Topology`."""
        return self._between.send_up(payload, received, group)

    def send_down(self, outgoing: Tensor, payload: Tensor, group: Group) -> dist.Work | None:
        """Start the downlink between nodes; see :class:`Topology`."""
        return self._between.send_down(outgoing, payload, group)


def _pack(job: BucketJob) -> None:
    job.pack()


def _average(job: BucketJob) -> None:
    job.average()


def _start_node_mean(job: BucketJob, group: Group) -> dist.Work | None:
    transfer = job.node
    assert transfer is not None
    return all_to_all_flat(
        transfer.received_bytes,
        transfer.packed_bytes,
        group,
        transfer.received_sizes,
        transfer.packed_sizes,
    )


def _start_node_gather(job: BucketJob, group: Group) -> dist.Work | None:
    if job.node is not None and job.node.is_shared:
        return _start_node_mean(job, group)  # the ranks only meet
    return all_gather_flat(job.downlink.view(-1), job.served.view(-1), group)
