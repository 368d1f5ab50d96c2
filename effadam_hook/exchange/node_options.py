"""The options that name the nodes of a process group, instead of their discovery by hosts."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from effadam_hook.errors import EffAdamError
from effadam_hook.exchange.topology import AUTO, HIERARCHICAL

__all__ = ["IntraNodeGroup", "NodeMesh", "check_node_options", "members_of_node"]

IntraNodeGroup = dist.ProcessGroup | Callable[[], dist.ProcessGroup]
"""The option ``intra_node_group``: a group of the ranks of this node, or a function that returns it."""

NodeMesh = tuple[int, int] | DeviceMesh | Callable[[], DeviceMesh]
"""The option ``device_mesh``: (nodes, ranks of a node), or a mesh of these, or a function for it."""


def check_node_options(topology: str, intra_node_group: object, device_mesh: object) -> None:
    """Check the options that name the nodes, as far as one rank can.

    Args:
        topology: The option ``topology``.
        intra_node_group: The option of that name.
        device_mesh: The option of that name.

    Raises:
        TypeError: If one has the wrong type.
        ValueError: If both are given, one is given for another topology, or the mesh has not two
            dimensions.
    """
    if intra_node_group is None and device_mesh is None:
        return
    if intra_node_group is not None and device_mesh is not None:
        raise ValueError(
            "Invalid intra_node_group and device_mesh: both are given. Must be at most one of them."
        )
    name = "device_mesh" if intra_node_group is None else "intra_node_group"
    if topology not in (AUTO, HIERARCHICAL):
        raise ValueError(
            f"Invalid {name} with topology={topology!r}. Must be left out: only the topologies "
            f'"{HIERARCHICAL}" and "{AUTO}" need to know the nodes.'
        )
    _check_group(intra_node_group)
    _check_mesh(device_mesh)


def _check_group(group: object) -> None:
    if group is not None and not isinstance(group, dist.ProcessGroup) and not callable(group):
        raise TypeError(
            f"Invalid intra_node_group: {type(group).__name__}. Must be a process group of the ranks "
            "of this node, or a function that returns it."
        )


def _check_mesh(mesh: object) -> None:
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 2:
            raise ValueError(
                f"Invalid device_mesh: it has {mesh.ndim} dimensions. Must have two: nodes, and ranks "
                "of a node."
            )
    elif isinstance(mesh, (tuple, list)):
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in mesh)
        if len(mesh) != 2 or not whole:
            raise ValueError(
                f"Invalid device_mesh: {mesh!r}. Must be two numbers above 0, (nodes, ranks of a node)."
            )
    elif mesh is not None and not callable(mesh):
        raise TypeError(
            f"Invalid device_mesh: {type(mesh).__name__}. Must be (nodes, ranks of a node), as two "
            "numbers, as a two-dimensional DeviceMesh, or as a function that returns one."
        )


def members_of_node(
    group: dist.ProcessGroup,
    intra_node_group: IntraNodeGroup | None,
    device_mesh: NodeMesh | None,
) -> tuple[int, ...] | None:
    """Return the ranks of this node as the options name them.

    Args:
        group: The process group.
        intra_node_group: The option of that name.
        device_mesh: The option of that name.

    Returns:
        Ranks in the group; None if the options name none.

    Raises:
        EffAdamError: If the options do not fit the group.
    """
    if callable(intra_node_group):
        intra_node_group = intra_node_group()
        _check_group(intra_node_group)
    if callable(device_mesh):
        device_mesh = device_mesh()
        _check_mesh(device_mesh)
    if intra_node_group is not None:
        named, option = dist.get_process_group_ranks(intra_node_group), "intra_node_group"
    elif isinstance(device_mesh, DeviceMesh):
        here, option = dist.get_rank(), "device_mesh"
        rows: list[list[int]] = device_mesh.mesh.tolist()
        named = next((row for row in rows if here in row), [])
        if not named:
            raise EffAdamError(f"device_mesh lacks rank {here} of the default group.")
    elif device_mesh is not None:
        nodes, ranks = device_mesh
        if nodes * ranks != group.size():
            raise EffAdamError(
                f"device_mesh={nodes, ranks} has {nodes * ranks} ranks, and the process group "
                f"{group.size()}."
            )
        first = group.rank() // ranks * ranks
        return tuple(range(first, first + ranks))
    else:
        return None
    own = dist.get_process_group_ranks(group)
    strangers = [str(rank) for rank in named if rank not in own]
    if strangers:
        raise EffAdamError(
            f"{option} has rank {', '.join(strangers)} of the default group, which the model's process "
            "group lacks."
        )
    return tuple(sorted(own.index(rank) for rank in named))
