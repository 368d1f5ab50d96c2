"""Fabric's side: every model that is set up gets a state, saved and loaded with the model."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from effadam_hook import EffAdamError, EfficientAdamState, attach
from lightning_plugin.checkpointing import KEY, load_states, saved_states
from lightning_plugin.families import Adaptable
from lightning_plugin.options import check_ddp_options, check_hook_options, exchanged_optimizer

if TYPE_CHECKING:
    from lightning.fabric.strategies import DDPStrategy as Base
else:
    Base = object  # the mixed-in class is that of either family

__all__ = ["FabricStrategyMixin"]


class FabricStrategyMixin(Adaptable, Base):
    """DDP for Fabric, with the two-way quantized exchange in place of the all-reduce.

    Options are those of :class:`lightning_plugin.EfficientAdamStrategy`.

    ``fabric.save`` puts every rank's residuals into the one file, ``fabric.load`` restores them;
    both for the models in the dictionary that they are called with.

    Example:
        >>> fabric = Fabric(strategy=EfficientAdamFabricStrategy(quantizer="lloyd4"), devices=2)
        >>> fabric.launch()
        >>> model, optimizer = fabric.setup(model, optimizer)
        >>> fabric.strategy.hook_state(model).stats()
    """

    def __init__(
        self,
        *,
        quantizer: str = "lloyd4",
        worker_quantizer: str | None = None,
        server_quantizer: str | None = None,
        block_size: int = 256,
        topology: str = "rank0",
        error_feedback: bool = True,
        exact: Sequence[str] = ("1d",),
        warmup_steps: int = 0,
        enabled: bool = True,
        auto: bool = False,
        scale_rule: str = "least_squares",
        wait_timeout_s: float | None = None,
        precondition: bool = False,
        quantize_weights: bool = False,
        **ddp_options: Any,
    ) -> None:
        hook_options: dict[str, Any] = {
            "quantizer": quantizer,
            "worker_quantizer": worker_quantizer,
            "server_quantizer": server_quantizer,
            "block_size": block_size,
            "topology": topology,
            "error_feedback": error_feedback,
            "exact": exact,
            "warmup_steps": warmup_steps,
            "enabled": enabled,
            "auto": auto,
            "scale_rule": scale_rule,
            "wait_timeout_s": wait_timeout_s,
        }
        mode_options: dict[str, Any] = {
            "precondition": precondition,
            "quantize_weights": quantize_weights,
        }
        check_hook_options(hook_options, mode_options)
        check_ddp_options(ddp_options, self.lightning_base, {*hook_options, *mode_options})
        self._arguments = {**hook_options, **mode_options, **ddp_options}
        self._mode_options = mode_options
        self._hook_options = hook_options
        self._states: weakref.WeakKeyDictionary[Module, EfficientAdamState]
        self._states = weakref.WeakKeyDictionary()
        super().__init__(**ddp_options)

    def hook_state(self, module: Module) -> EfficientAdamState:
        """The state of a model.

        Args:
            module: What ``fabric.setup`` returned.

        Raises:
            KeyError: If this strategy has not set the model up.
        """
        return self._states[getattr(module, "_forward_module", module)]

    def setup_module(self, module: Module) -> DistributedDataParallel:
        """Wrap a model and register the hook, for any optimizer."""
        if any(self._mode_options.values()):
            raise EffAdamError(
                "precondition=True and quantize_weights=True need the optimizer when the model is "
                "set up. Call fabric.setup(model, optimizer)."
            )
        return self._wrap(module, None)

    def setup_module_and_optimizers(
        self, module: Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> Any:
        """Wrap a model and register the hook, for update mode if there is an EfficientAdam."""
        wrapped = self._wrap(module, exchanged_optimizer(optimizers, self._mode_options))
        return wrapped, [self.setup_optimizer(one) for one in optimizers], scheduler

    def _wrap(self, module: Module, optimizer: Optimizer | None) -> DistributedDataParallel:
        wrapped: DistributedDataParallel = super().setup_module(module)
        self._states[wrapped] = attach(
            wrapped,
            optimizer=optimizer,
            grad_scaler=getattr(self.precision, "scaler", None),
            **self._mode_options,
            **self._hook_options,
        )
        return wrapped

    def save_checkpoint(self, path: Any, state: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint with the residuals of all ranks; every rank must call this."""
        extended = {**state, **saved_states(self._states_in(state))}
        super().save_checkpoint(path, extended, *args, **kwargs)

    def load_checkpoint(
        self,
        path: Any,
        state: Module | Optimizer | dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Read a checkpoint into the given objects, and the residuals into their models' states."""
        rest: dict[str, Any] = super().load_checkpoint(path, state, *args, **kwargs)
        if state and isinstance(state, Mapping):
            load_states(rest, self._states_in(state))
            rest.pop(KEY, None)
        return rest

    def __getstate__(self) -> dict[str, Any]:
        # For launchers that pickle the strategy, which they do before any model is set up.
        state = dict(vars(self))
        del state["_states"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._states = weakref.WeakKeyDictionary()

    def _states_in(self, saved: Mapping[str, Any]) -> dict[str, EfficientAdamState]:
        return {
            name: self._states[value]
            for name, value in saved.items()
            if isinstance(value, DistributedDataParallel) and value in self._states
        }
