"""The parameter groups of a model that FSDP2 shards, and the shards of this rank.

The only file that reads FSDP's own objects. After a backward through a module, FSDP reduce-scatters
the gradients of its *parameter group* over the shard mesh. This rank gets a flat tensor with its
shard of every parameter, each padded to the size of the first rank's::

    reduced | shard of weight ......... | padding | shard of bias | padding |

The group's hook is called with this tensor, in the reduce dtype, on the stream of the all-reduce.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from effadam_hook.errors import EffAdamError
from effadam_hook.kernels.arguments import compute_dtype

__all__ = ["Shard", "ShardGroup", "find_groups", "is_sharded", "name_shards"]


def is_sharded(model: object) -> bool:
    """Return whether a module of the model went through ``fully_shard`` (or ``replicate``)."""
    if not isinstance(model, nn.Module) or isinstance(model, DistributedDataParallel):
        return False
    return any(True for _ in _fsdp_modules(model))


def _fsdp_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    try:
        from torch.distributed.fsdp import FSDPModule
    except ImportError:  # torch before 2.6
        return
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            yield name, module


class Shard:
    """This rank's shard of one parameter.

    Args:
        param: FSDP's record of the parameter.
        device: The device on which gradients are reduced.

    Attributes:
        owner: ``[shard shape]``, stands for the shard in buckets, by identity. It shares the memory of
            the weights, and has none where they are offloaded.
        numel: Number of elements, 0 on a rank without a part of the parameter.
        padded_numel: Number of elements with the padding.
    """

    def __init__(self, param: Any, device: torch.device) -> None:
        self._param = param
        self._device = device
        self.numel: int = param.sharded_size.numel()
        self.padded_numel: int = param.padded_sharded_param_size.numel()
        self.owner = nn.Parameter(self._weights(), requires_grad=param.sharded_param.requires_grad)
        self.owner.whole_numel = self.parameter.numel()  # type: ignore[attr-defined]

    def _weights(self) -> Tensor:
        local: Tensor = self.parameter.to_local().detach()
        if local.device == self._device:
            return local
        return torch.zeros((), dtype=local.dtype, device=self._device).expand(local.shape)

    @property
    def parameter(self) -> Any:
        """The parameter of the sharded model, a DTensor."""
        return self._param.sharded_param

    @property
    def is_trainable(self) -> bool:
        """Return whether the parameter has gradients."""
        return bool(self.parameter.requires_grad)

    def as_dtensor(self, values: Tensor | None) -> Tensor:
        """Return values of the shard as a DTensor with the placements of the parameter.

        Args:
            values: ``[numel]``, residuals; None for zeros.
        """
        from torch.distributed.tensor import DTensor

        parameter = self.parameter
        device, dtype = parameter.to_local().device, compute_dtype(parameter.dtype)
        if values is None:
            values = torch.zeros(self.numel)
        local = values.to(device, dtype).view(self._param.sharded_size)
        return DTensor.from_local(
            local,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

    def follow(self) -> bool:
        """Follow weights that were replaced, as ``load_state_dict(assign=True)`` does.

        Returns:
            Whether the weights have moved.
        """
        weights = self.parameter.to_local()
        if weights.device != self._device or weights.data_ptr() == self.owner.data_ptr():
            return False
        self.owner.data = weights.detach()
        return True


@dataclass(eq=False)
class ShardGroup:
    """One parameter group of FSDP: a bucket.

    Attributes:
        name: Name of the group's module; empty for the root.
        shards: This rank's shards, in the order of the reduced tensor.
    """

    name: str
    shards: list[Shard]
    _module: Any
    _group: Any
    _is_only_group: bool

    @property
    def device(self) -> torch.device:
        """The device on which gradients are reduced."""
        device: torch.device = self._group.device
        return device

    @property
    def shard_group(self) -> dist.ProcessGroup:
        """The process group over which the parameters are sharded."""
        group: dist.ProcessGroup = self._group.mesh_info.shard_process_group
        return group

    @property
    def offloads(self) -> bool:
        """Return whether parameters and gradients are offloaded to the CPU."""
        return any(shard._param.offload_to_cpu for shard in self.shards)

    @property
    def is_last_microbatch(self) -> bool:
        """Return whether this backward ends an accumulation: ``set_requires_all_reduce(True)``."""
        return bool(self._group.all_reduce_grads)

    @property
    def sums(self) -> bool:
        """Return whether ``set_gradient_divide_factor`` has replaced the division by the ranks."""
        # torch 2.7 has set_reduce_scatter_divide_factor instead, and averages over the replicas.
        return getattr(self._group, "gradient_divide_factor", None) is not None

    def check_free(self) -> None:
        """Check that the group has no hook.

        Raises:
            EffAdamError: If it has one.
        """
        other = self._group._all_reduce_hook
        if other is not None and not getattr(other, "is_closed", False):
            raise EffAdamError(
                f"The module {self.name or '(root)'!r} has the all-reduce hook {_name_of(other)!r} "
                "already, and FSDP takes only one. Attach before any other, and once."
            )

    def check_hook(self, hook: object) -> None:
        """Check that FSDP still calls a hook.

        Args:
            hook: The hook of :meth:`set_hook`.

        Raises:
            EffAdamError: If another one has replaced it.
        """
        other = self._group._all_reduce_hook
        if other is not hook:
            raise EffAdamError(
                f"The all-reduce hook of the module {self.name or '(root)'!r} was replaced by "
                f"{_name_of(other)!r} after attach, so that its gradients would not be exchanged. "
                "Leave out the later call of set_all_reduce_hook: FSDP takes one hook only."
            )

    def is_in(self, groups: list[ShardGroup]) -> bool:
        """Return whether FSDP's record of this group is that of a group in a list."""
        return any(each._group is self._group for each in groups)

    def makes_views_of(self, reduced: Tensor, shards: list[Shard]) -> bool:
        """Return whether FSDP makes gradients of a reduced tensor without reading its values.

        It does unless it casts or divides the tensor after the hook, adds it to earlier gradients,
        copies them to the CPU, or calls the user's hooks with a gradient.

        Args:
            reduced: ``[padded numel]``.
            shards: The shards of the tensor.
        """
        divides = reduced.dtype not in (torch.float32, torch.bfloat16) or self.sums
        divides |= getattr(self._group, "force_sum_reduction_for_comms", False)  # not in torch 2.7
        if divides or (self.offloads and reduced.device.type != "cpu"):
            return False
        return all(
            shard.parameter.dtype == reduced.dtype
            and shard.parameter.grad is None
            and not shard.parameter._post_accumulate_grad_hooks
            for shard in shards
        )

    def set_hook(self, hook: Callable[[Tensor], None], drop_kept: Callable[[], None]) -> None:
        """Register a hook for the reduced tensor.

        Args:
            hook: Called with ``[padded numel]``, in the stream of the all-reduce, under ``no_grad``.
            drop_kept: Called by ``reset_iter_state()``, in which FSDP drops the gradients of earlier
                micro-batches.
        """
        reset = getattr(self._group, "_reset_iter_state", None)  # torch 2.13
        if reset is not None:
            reset = getattr(reset, "of_fsdp", reset)  # without the hook of a closed state

            def reset_all() -> None:
                reset()
                drop_kept()

            reset_all.of_fsdp = reset  # type: ignore[attr-defined]
            self._group._reset_iter_state = reset_all
        if self._is_only_group:
            self._module.set_all_reduce_hook(hook)
        else:  # set_all_reduce_hook refuses modules with several groups
            self._group._all_reduce_hook = hook

    def trainable(self, reduced: Tensor) -> list[Shard]:
        """Return the shards whose gradients a reduced tensor holds.

        Args:
            reduced: ``[padded numel]``.

        Raises:
            EffAdamError: If some parameters had no gradient in this backward.
        """
        shards = [shard for shard in self.shards if shard.is_trainable]
        numel = sum(shard.padded_numel for shard in shards)
        if reduced.numel() != numel:
            raise EffAdamError(
                f"FSDP has reduced {reduced.numel()} elements of the module "
                f"{self.name or '(root)'!r}, and its trainable parameters have {numel} on this "
                "rank: some had no gradient in this backward. Call "
                "model.set_reduce_scatter_unused_params(True) (torch 2.13), which includes zeros for "
                "them, or set requires_grad=False for parameters that are not trained."
            )
        return shards


def _name_of(hook: object) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__name__))


def find_groups(model: nn.Module, *, trained_only: bool = False) -> list[ShardGroup]:
    """Return the parameter groups of a model, in the order of its modules.

    Args:
        model: A model with modules that went through ``fully_shard``, those that are trained over a
            mesh of one dimension. Frozen ones on other meshes are left out.
        trained_only: Leave out all groups whose parameters are frozen.

    Raises:
        ValueError: If FSDP averages over replicas itself, or a module is on the meta device.
        EffAdamError: If torch is older than 2.7.
    """
    found: list[ShardGroup] = []
    seen: set[int] = set()
    for name, module in _fsdp_modules(model):
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # torch before 2.12 has one group a module
            groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
        for group in groups:
            if id(group) in seen:  # fully_shard([a, b]) makes one group of two modules
                continue
            seen.add(id(group))
            is_frozen = not any(p.sharded_param.requires_grad for p in group.fsdp_params)
            if is_frozen and (trained_only or group.mesh_info.replicate_mesh_dim is not None):
                continue
            if not hasattr(group, "_all_reduce_hook"):
                raise EffAdamError(
                    f"torch {torch.__version__} has no all-reduce hook for models that went through "
                    "fully_shard. Must be torch 2.7 or later."
                )
            _check_mesh(name, group.mesh_info)
            for param in group.fsdp_params:
                if param.sharded_param.is_meta:
                    raise ValueError(
                        f"Invalid model: a parameter of the module {name or '(root)'!r} is on the "
                        "meta device. Attach after model.to_empty(device=...) and its initialization."
                    )
            shards = [Shard(param, group.device) for param in group.fsdp_params]
            found.append(ShardGroup(name, shards, module, group, len(groups) == 1))
    return found


def _check_mesh(name: str, mesh_info: Any) -> None:
    where = f"the module {name!r}" if name else "the root module"
    if mesh_info.replicate_mesh_dim is None:
        return
    if mesh_info.shard_mesh_dim is None:
        raise ValueError(
            f"Invalid model: {where} went through replicate(), which averages gradients densely "
            "itself. Must be a DistributedDataParallel, or sharded by fully_shard."
        )
    raise ValueError(
        f"Invalid model: {where} is sharded over a mesh of two dimensions (HSDP), where FSDP averages "
        "densely over the replicas before the hook; replicate() of torch 2.9 makes such a mesh. Must "
        "have one dimension: "
        'fully_shard(module, mesh=mesh["shard"]), and attach(model, '
        'process_group=mesh.get_group("replicate"), ...).'
    )


def name_shards(
    model: nn.Module, groups: list[ShardGroup]
) -> tuple[list[tuple[str, Tensor]], list[tuple[str, nn.Parameter]]]:
    """Return the names of all shards, and the parameters that FSDP does not manage.

    Names come from the modules, as the model may be unsharded at the moment.

    Args:
        model: The model.
        groups: Its parameter groups.

    Returns:
        Names and owners in the order of ``named_parameters(remove_duplicate=False)``, and names and
        values of the other parameters.
    """
    owners: dict[tuple[int, str], Tensor] = {}
    for group in groups:
        for shard in group.shards:
            info = shard._param._module_info
            owners[id(info.module), info.param_name] = shard.owner
            for module, name in zip(info.shared_modules, info.shared_param_names, strict=True):
                owners[id(module), name] = shard.owner
    named: list[tuple[str, Tensor]] = []
    others: list[tuple[str, nn.Parameter]] = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            path = f"{prefix}.{name}" if prefix else name
            owner = owners.get((id(module), name))
            if owner is not None:
                named.append((path, owner))
            elif parameter is not None:
                others.append((path, parameter))
    return named, others
