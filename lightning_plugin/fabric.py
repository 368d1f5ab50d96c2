"""Strategy for Fabric: every model has a state, which is saved and loaded with the model."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from effadam_hook import EffAdamError, EfficientAdamState, attach
from lightning_plugin.base import ExchangeStrategy
from lightning_plugin.checkpointing import KEY, load_states, saved_states
from lightning_plugin.options import exchanged_optimizer, needs_optimizer

if TYPE_CHECKING:
    from lightning.fabric.strategies import DDPStrategy as Base
else:
    Base = object  # the DDPStrategy of either family follows in the order of resolution

__all__ = ["FabricStrategyMixin"]


class FabricStrategyMixin(ExchangeStrategy, Base):
    """DDP for Fabric, with the two-way quantized exchange instead of the all-reduce.

    Options are those of :class:`lightning_plugin.EfficientAdamStrategy`. ``fabric.save`` adds the
    residuals of all ranks to the file, and ``fabric.load`` restores them, for the models in their
    argument ``state``.

    Examples:
        >>> fabric = Fabric(strategy=EfficientAdamFabricStrategy(quantizer="lloyd4"), devices=2)
        >>> fabric.launch()
        >>> model, optimizer = fabric.setup(model, optimizer)
        >>> fabric.strategy.hook_state(model).stats()
    """

    def _prepare(self) -> None:
        self._states: weakref.WeakKeyDictionary[Module, EfficientAdamState]
        self._states = weakref.WeakKeyDictionary()

    def hook_state(self, module: Module) -> EfficientAdamState:
        """Return the state of a model.

        Args:
            module: The model that ``fabric.setup`` returned.

        Raises:
            KeyError: If this strategy did not set up the model.
        """
        return self._states[getattr(module, "_forward_module", module)]

    def setup_module(self, module: Module) -> DistributedDataParallel:
        """Wrap a model and register the hook in gradient mode."""
        if needs_optimizer(self._hook_options):
            raise EffAdamError(
                "precondition=True and quantize_weights=True require the optimizer during setup of "
                "the model. Call fabric.setup(model, optimizer)."
            )
        return self._wrap(module, None)

    def setup_module_and_optimizers(
        self, module: Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> Any:
        """Wrap a model and register the hook, in update mode for an EfficientAdam."""
        wrapped = self._wrap(module, exchanged_optimizer(optimizers, self._hook_options))
        return wrapped, [self.setup_optimizer(one) for one in optimizers], scheduler

    def _wrap(self, module: Module, optimizer: Optimizer | None) -> DistributedDataParallel:
        wrapped: DistributedDataParallel = super().setup_module(module)
        self._states[wrapped] = state = attach(
            wrapped,
            optimizer=optimizer,
            grad_scaler=getattr(self.precision, "scaler", None),
            **self._node_options,
            **self._hook_options,
        )
        state.session.mode.expect_saving()
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
        """Load a checkpoint into the given objects, and the residuals into the states of the models."""
        rest: dict[str, Any] = super().load_checkpoint(path, state, *args, **kwargs)
        if state and isinstance(state, Mapping):
            load_states(rest, self._states_in(state))
            rest.pop(KEY, None)
        return rest

    def __getstate__(self) -> dict[str, Any]:
        # For launchers that pickle the strategy, always before a model is set up.
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
