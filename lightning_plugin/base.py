"""Base of the strategies for Trainer and Fabric: the options of the hook and their checks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from effadam_hook.config.options import HookOptions, accepts_options, complete_options
from effadam_hook.exchange.node_options import IntraNodeGroup, NodeMesh
from lightning_plugin.families import Adaptable
from lightning_plugin.options import NodeOptions, check_ddp_options, check_hook_options

if TYPE_CHECKING:
    from lightning.fabric.strategies import DDPStrategy as Base
else:
    Base = object  # the DDPStrategy of either family follows in the order of resolution

__all__ = ["ExchangeStrategy"]


@accepts_options(HookOptions)
class ExchangeStrategy(Adaptable, Base):
    """DDP with the two-way quantized exchange instead of the all-reduce.

    Accepts all options of :func:`effadam_hook.attach`, and every argument of Lightning's
    ``DDPStrategy`` and of torch's ``DistributedDataParallel``.

    Args:
        intra_node_group: Function that returns the process group of the ranks of this node, called when
            the process group exists; or that group. None to find the nodes by the hosts of the ranks.
        device_mesh: Instead of ``intra_node_group``: ``(nodes, ranks of a node)``, or a function that
            returns a two-dimensional ``DeviceMesh``.
        **options: Options of :class:`effadam_hook.config.options.HookOptions`.
        **ddp_options: Arguments of Lightning's ``DDPStrategy`` and ``DistributedDataParallel``, such as
            ``find_unused_parameters``, ``process_group_backend`` or ``start_method``.

    Raises:
        ValueError: If the value of an option is invalid, or cannot be combined with compression.
        TypeError: If an option is unknown or has the wrong type.
    """

    # A strategy has the options of the hook among those of DDP; accepts_options lists them by name.
    def __init__(
        self,
        intra_node_group: IntraNodeGroup | None = None,
        device_mesh: NodeMesh | None = None,
        **ddp_options: Any,
    ) -> None:
        names = HookOptions.__annotations__
        given = {name: ddp_options.pop(name) for name in names if name in ddp_options}
        options = complete_options(given, HookOptions)
        nodes: NodeOptions = {"intra_node_group": intra_node_group, "device_mesh": device_mesh}
        check_hook_options(options, nodes)
        check_ddp_options(ddp_options, self.lightning_base)
        self._arguments = {**nodes, **options, **ddp_options}
        self._hook_options, self._node_options = options, nodes
        self._prepare()
        super().__init__(**ddp_options)

    def _prepare(self) -> None:
        """Create the attributes of a strategy that has not run yet."""
