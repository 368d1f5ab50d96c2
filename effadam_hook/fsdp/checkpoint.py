"""Saved states of sharded models: DTensors, for ``torch.distributed.checkpoint``.

Every rank writes its part. The workers of the exchange are the replicas, so that a worker residual is a
DTensor for each replica; the servers' residuals form one DTensor, the same on all replicas::

    worker.0.layer.weight      worker.1.layer.weight      server.layer.weight
      shard 0 | shard 1          shard 0 | shard 1          shard 0 | shard 1

DTensors have the placements of their parameters, and ``torch.distributed.checkpoint`` reshards them
for another shard mesh. On another number of replicas every replica starts with the mean of the saved
worker residuals, as for DDP (:mod:`effadam_hook.feedback.reshard`).
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from effadam_hook._version import STATE_VERSION, __version__
from effadam_hook.errors import StateMismatchError
from effadam_hook.exchange.waiting import gather_bytes
from effadam_hook.feedback.checkpoint import RankState, Share
from effadam_hook.feedback.schema import StateReader
from effadam_hook.fsdp.groups import Shard
from effadam_hook.session.session import ExchangeSession
from effadam_hook.session.snapshot import capture, restore, role_of
from effadam_hook.wire.counters import COUNTER_NAMES, Counters

__all__ = ["load_checkpoint", "restore_shards", "save_shards"]

_PLAIN = frozenset("version replicas counters units".split())


def save_shards(session: ExchangeSession, shards: Mapping[str, Shard]) -> dict[str, Any]:
    """Return the state of this rank's shards; a collective operation of the replicas.

    Args:
        session: The session.
        shards: The shards by name.

    Returns:
        DTensors and plain values. Tensors are copies. Residuals have the scale of the unscaled loss.
    """
    own = capture(session)
    server = _whole_shards(session, own.server, shards)
    quantized = _quantized(session, shards)
    return {
        "version": STATE_VERSION,
        "package": __version__,
        "config": session.config.to_dict(),
        "replicas": own.world_size,
        "counters": own.counters.to_dict(),
        "units": own.units,
        "worker": {
            str(own.rank): {
                name: shards[name].as_dtensor(own.worker.get(name)) for name in quantized
            }
        },
        "server": {name: shards[name].as_dtensor(server.get(name)) for name in quantized},
    }


def _quantized(session: ExchangeSession, shards: Mapping[str, Shard]) -> list[str]:
    """Return the names of the parameters that have residuals; those of exact ones are zero."""
    config = session.config
    if not config.error_feedback:
        return []
    return [
        name
        for name, shard in shards.items()
        if shard.is_trainable
        and not config.is_exact(
            session.parameters.find(shard.owner).aliases,
            shard.owner.ndim,
            shard.parameter.numel(),
        )
    ]


def _whole_shards(
    session: ExchangeSession, own: Mapping[str, Share], shards: Mapping[str, Shard]
) -> dict[str, Tensor]:
    """Return the residuals of all servers for this rank's shards."""
    file = io.BytesIO()
    torch.save({name: (share.start, share.values) for name, share in own.items()}, file)
    with session.connection.waiting("state_dict()"):
        device = session.parameters.device()
        files = gather_bytes(file.getvalue(), session.group, device, everywhere=True)
    whole: dict[str, Tensor] = {}
    for data in files:
        for name, (start, values) in torch.load(io.BytesIO(data), weights_only=True).items():
            if name not in whole:
                whole[name] = torch.zeros(shards[name].numel, dtype=values.dtype)
            whole[name][start : start + values.numel()] = values
    return whole


def restore_shards(
    session: ExchangeSession, shards: Mapping[str, Shard], saved: Mapping[str, Any]
) -> None:
    """Continue from a saved state of the same number of replicas.

    Args:
        session: The session; unchanged if an error is raised.
        shards: The shards by name.
        saved: The dictionary of :func:`save_shards`, with the worker residuals of this replica.

    Raises:
        StateMismatchError: If it does not fit.
    """
    reader = _plain_values(saved)
    replicas, mine = session.group.size(), str(session.group.rank())
    if reader.integer("replicas", least=1) != replicas or mine not in saved["worker"]:
        raise StateMismatchError(
            f"The saved state has {saved['replicas']} replicas, those of {_listed(saved['worker'])} "
            f"here, and this run is replica {mine} of {replicas}. Load it with "
            "state.load_checkpoint(...), which reads the residuals of all replicas."
        )
    counters = Counters(**reader.integers("counters", COUNTER_NAMES))
    for tensors in (saved["worker"][mine], saved["server"]):
        _check_names(tensors, shards)
        _check_shapes({name: tensor.shape for name, tensor in tensors.items()}, shards)
    _restore(session, shards, saved, saved["worker"][mine], counters)


def _restore(
    session: ExchangeSession,
    shards: Mapping[str, Shard],
    saved: Mapping[str, Any],
    worker: Mapping[str, Any],
    counters: Counters,
) -> None:
    topology = session.topology
    role = role_of(session, topology)
    server: dict[str, Share] = {}
    names = [name for name in worker if shards[name].numel]
    for name in names:
        first, numel = role.share(name, shards[name].numel)
        if numel and name in saved["server"]:
            whole = _local(saved["server"][name])
            server[name] = Share(first, whole[first : first + numel].clone())
    state = RankState(
        rank=role.rank,
        world_size=role.world_size,
        topology=topology.name,
        servers=role.servers,
        block_size=role.block_size,
        counters=counters,
        units=saved["units"],
        worker={name: _local(worker[name]).clone() for name in names},
        server=server,
        moments={},
        config={},
    )
    restore(session, state.to_dict())


def load_checkpoint(
    session: ExchangeSession,
    shards: Mapping[str, Shard],
    checkpoint_id: Any,
    key: str,
) -> None:
    """Continue from a checkpoint of any number of replicas and any shard mesh.

    A collective operation of all ranks.

    Args:
        session: The session.
        shards: The shards by name.
        checkpoint_id: A checkpoint of ``torch.distributed.checkpoint``, or a reader of one.
        key: Key of the state in the dictionary that was saved.

    Raises:
        StateMismatchError: If the checkpoint has no such state, or it does not fit.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.checkpoint.storage import StorageReader

    is_reader = isinstance(checkpoint_id, StorageReader)
    reader = checkpoint_id if is_reader else FileSystemReader(checkpoint_id)
    keys = reader.read_metadata().state_dict_metadata
    pattern = re.compile(re.escape(f"{key}.worker.") + r"(\d+)\.(.*)", re.S)
    found = [match.groups() for match in map(pattern.fullmatch, keys) if match]
    if f"{key}.replicas" not in keys:
        raise StateMismatchError(
            f"The checkpoint {checkpoint_id} has no state under {key!r}: it has "
            f"{_listed(sorted({name.partition('.')[0] for name in keys}))}. Save it with "
            f"dcp.save({{{key!r}: state.state_dict(), ...}}, ...)."
        )
    saved_names = {name for _, name in found}
    _check_names(saved_names, shards)
    records = {name: keys[f"{key}.worker.{replica}.{name}"] for replica, name in found}
    shapes = {name: record.size for name, record in records.items() if hasattr(record, "size")}
    _check_shapes(shapes, shards)
    names = [name for name in _quantized(session, shards) if name in saved_names]
    plain: dict[str, Any] = dict.fromkeys(("version", "replicas", "units"))
    plain["counters"] = dict.fromkeys(COUNTER_NAMES)
    server = {name: shards[name].as_dtensor(None) for name in names}
    content: dict[str, Any] = {key: {**plain, "server": server, "worker": {}}}
    load(content, storage_reader=reader)
    saved = content[key]
    values = _plain_values(saved)
    counters = Counters(**values.integers("counters", COUNTER_NAMES))
    replicas = values.integer("replicas", least=1)
    same = replicas == session.group.size()
    mean: dict[str, Tensor] = {}
    for replica in [session.group.rank()] if same else range(replicas):
        tensors = {name: shards[name].as_dtensor(None) for name in names}
        load({key: {"worker": {str(replica): tensors}}}, storage_reader=reader)
        for name, tensor in tensors.items():
            local = _local(tensor)
            mean[name] = local if same else mean.get(name, 0) + local.double() / replicas
    mean = {name: values.to(_local(server[name]).dtype) for name, values in mean.items()}
    _restore(session, shards, saved, mean, counters)


def _plain_values(saved: Any) -> StateReader:
    if not isinstance(saved, Mapping) or not {"worker", "server"} <= saved.keys():
        raise StateMismatchError(
            "This is no saved state of a sharded model: it must be the dictionary that state_dict() of "
            "a sharded model's state returns."
        )
    return StateReader({key: value for key, value in saved.items() if key in _PLAIN}, _PLAIN)


def _local(tensor: Tensor) -> Tensor:
    to_local = getattr(tensor, "to_local", None)
    local: Tensor = tensor if to_local is None else to_local()
    return local.detach().reshape(-1).cpu()


def _check_names(saved: Iterable[str], shards: Mapping[str, Shard]) -> None:
    unknown = sorted(set(saved) - set(shards))
    if unknown:
        raise StateMismatchError(
            f"The saved state has residuals of parameters that this model does not have: "
            f"{_listed(unknown[:5])} ({len(unknown)} in total); it has {_listed(sorted(shards)[:5])}, "
            f"{len(shards)} in total. Load it into the model that was saved, under the same names."
        )


def _check_shapes(saved: Mapping[str, Sequence[int]], shards: Mapping[str, Shard]) -> None:
    for name, shape in saved.items():
        own = tuple(shards[name].parameter.shape)
        if tuple(shape) != own:
            raise StateMismatchError(
                f"The saved state has residuals of shape {tuple(shape)} for {name!r}, and the "
                f"parameter has shape {own} here. Load it into the model that was saved."
            )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
