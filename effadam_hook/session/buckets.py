"""The buckets of a session, each with the buffers of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from effadam_hook.config import Config
from effadam_hook.errors import EffAdamError
from effadam_hook.exchange.staging import Staging
from effadam_hook.exchange.topology import Topology
from effadam_hook.feedback.parameters import ParameterTable, whole_numel
from effadam_hook.feedback.residuals import Residuals
from effadam_hook.kernels import Kernels
from effadam_hook.kernels.arguments import compute_dtype
from effadam_hook.modes import Mode
from effadam_hook.session.block_size import BlockSize
from effadam_hook.session.buffers import BucketBuffers
from effadam_hook.session.node_buffers import MeanMemory, NodeBuffers
from effadam_hook.wire.layout import Slot, lay_out_bucket
from effadam_hook.wire.node_layout import lay_out_node, whole_runs
from effadam_hook.wire.parts import cut

__all__ = ["Buckets"]


class Model(Protocol):
    """The session, as far as the buffers of a bucket depend on it."""

    config: Config
    mode: Mode
    parameters: ParameterTable
    worker: Residuals
    server: Residuals
    blocks: BlockSize

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group."""
        ...

    @property
    def topology(self) -> Topology:
        """This rank's view of the servers."""
        ...


class Buckets:
    """The buffers of every bucket, by the index of the bucket.

    DDP changes its buckets during training: an index with other tensors than before gets new
    buffers, to which residuals and moments move. After a rank has loaded other moments, it gets new
    buffers with the same node buffers, whose memory the other ranks of the node read.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[object, int, list[BucketBuffers]]] = {}
        self._means = MeanMemory()

    def all(self) -> list[BucketBuffers]:
        """Return the buffers of the current buckets, in order; a large bucket has several."""
        return [buffers for _, _, parts in self._known.values() for buffers in parts]

    def of(
        self,
        index: int,
        flat: Tensor,
        tensors: Sequence[Tensor],
        model: Model,
        part_numel: int | None,
        kernels: Kernels,
        staging: Staging,
        run_id: str,
    ) -> list[BucketBuffers]:
        """Return the buffers of a bucket, one for each part; new ones if its tensors have changed.

        Args:
            index: Index of the bucket.
            flat: ``[numel]``, the elements of the bucket.
            tensors: The owners of the elements.
            model: Options, names and residuals.
            part_numel: Elements of a part; None for one part.
            kernels: The implementation of the arithmetic.
            staging: The memory of the collectives.
            run_id: Run id of the model.

        Raises:
            EffAdamError: If the tensors do not have as many elements as the bucket.
        """
        key, generation = (flat.dtype, flat.device, *map(id, tensors)), model.mode.generation
        known_key, known_generation, known = self._known.get(index, (None, 0, []))
        if (known_key, known_generation) == (key, generation):
            return known
        numels = [tensor.numel() for tensor in tensors]
        if sum(numels) != flat.numel():
            raise EffAdamError(
                f"Bucket {index} has {flat.numel()} elements and its parameters have "
                f"{sum(numels)}. They must be equal; a parameter was resized after DDP was built."
            )
        cuts = cut(numels, part_numel)
        nodes = [one.node for one in known] if known_key == key else [None] * len(cuts)
        parts = [
            _make(
                f"bucket {index}" + (f", part {number}" if len(cuts) > 1 else ""),
                flat,
                tensors[part],
                model,
                kernels,
                staging,
                node,
                self._means,
                check_every_step=index == number == 0,
                run_id=run_id,
            )
            for number, (part, node) in enumerate(zip(cuts, nodes, strict=True))
        ]
        self._known[index] = (key, generation, parts)
        return parts


def _make(
    label: str,
    flat: Tensor,
    tensors: Sequence[Tensor],
    model: Model,
    kernels: Kernels,
    staging: Staging,
    node: NodeBuffers | None,
    means: MeanMemory,
    *,
    check_every_step: bool,
    run_id: str,
) -> BucketBuffers:
    config, mode, topology = model.config, model.mode, model.topology
    slots = _slots(tensors, config, model.parameters)
    dtype = mode.wire_dtype(flat.dtype)
    layout = lay_out_bucket(
        slots,
        uplink=config.uplink,
        downlink=config.downlink,
        scale_rule=config.scale_rule,
        block_size=model.blocks.value,
        servers=topology.servers,
        itemsize=dtype.itemsize,
        shares=topology.shares,
    )
    if node is None and topology.shares > 1:
        layouts = lay_out_node(layout, topology.shares)
        node = NodeBuffers(
            layouts,
            topology.share,
            flat.dtype,
            compute_dtype(flat.dtype),
            flat.device,
            staging,
            (topology.servers, layout.downlink.stride_bytes),
            means,
        )
    runs = whole_runs(slots) if node is None else node.layout.runs
    return BucketBuffers(
        label,
        layout,
        runs,
        node,
        kernels,
        staging,
        topology,
        dtype,
        flat.device,
        model.worker if config.error_feedback else None,
        model.server if config.error_feedback else None,
        mode.content(tensors, slots, flat.dtype, runs),
        tensors,
        check_every_step=check_every_step,
        run_id=run_id,
    )


def _slots(tensors: Sequence[Tensor], config: Config, parameters: ParameterTable) -> list[Slot]:
    slots: list[Slot] = []
    start = 0
    for tensor in tensors:
        known = parameters.find(tensor)
        exact = config.is_exact(known.aliases, tensor.ndim, whole_numel(tensor))
        slots.append(Slot(known.name, start, tensor.numel(), exact))
        start += tensor.numel()
    return slots
