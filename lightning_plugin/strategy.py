"""Strategy for a Trainer: creation, registration, saving and restoring of the hook's state.

A fit consists of the following steps; those of Lightning are in parentheses::

    Trainer(strategy=...)        [1] options are checked; the process group does not exist yet
    (process group starts)
    load_checkpoint              [2] new weights follow: residuals of an earlier fit become invalid
    setup  (wraps in DDP,        [3] the state is created and its hook registered, on any device
            makes optimizers)    [4] residuals of an earlier fit of the same model are copied
    load_optimizer_state_dict    [5] residuals of a checkpoint replace them
    (training)
    save_checkpoint              [6] the residuals of all ranks are added to the file of rank 0
    teardown (unwraps)           [7] the exchange ends; the state remains readable and can be saved
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info
from torch.optim import Optimizer

from effadam_hook import EffAdamError, EfficientAdam, EfficientAdamState, attach
from effadam_hook.feedback.checksum import with_checksum
from lightning_plugin.base import ExchangeStrategy
from lightning_plugin.checkpointing import load_states, saved_states
from lightning_plugin.options import exchanged_optimizer

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy as Base
else:
    Base = object  # the DDPStrategy of either family follows in the order of resolution

__all__ = ["StrategyMixin", "register_strategies"]

MODEL = "model"
"""Name of the state in a checkpoint; a Trainer has one model."""


class StrategyMixin(ExchangeStrategy, Base):
    """DDP for a Trainer, with the two-way quantized exchange instead of the all-reduce.

    Accepts all options of :class:`effadam_hook.config.options.HookOptions`, and every argument of
    Lightning's ``DDPStrategy`` and of torch's ``DistributedDataParallel``. The communication hook is
    registered on CPU as well as on CUDA. If ``configure_optimizers`` returns an
    :class:`effadam_hook.EfficientAdam`, updates are exchanged instead of gradients.

    Examples:
        >>> trainer = Trainer(strategy=EfficientAdamStrategy(quantizer="lloyd4"), devices=2)
    """

    def _prepare(self) -> None:
        self._hook_state: EfficientAdamState | None = None
        self._trained: weakref.ref[LightningModule] | None = None
        self._weights_replaced = False
        self._clipping_moved: tuple[Trainer, float] | None = None

    @property
    def hook_state(self) -> EfficientAdamState | None:
        """Return the state of the current or last fit; None before the first fit."""
        return self._hook_state

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint; see the base class."""
        self._weights_replaced = True  # [2]
        checkpoint: dict[str, Any] = super().load_checkpoint(*args, **kwargs)
        return checkpoint

    def setup(self, trainer: Trainer) -> None:
        """Wrap the model, create the optimizers, and register the hook for a fit."""
        super().setup(trainer)
        if trainer.state.fn == "fit":
            optimizer = exchanged_optimizer(self.optimizers, self._hook_options)
            if isinstance(optimizer, EfficientAdam):
                self._prepare_update_mode(optimizer, trainer)
            self._start_exchange(optimizer)

    def _prepare_update_mode(self, optimizer: EfficientAdam, trainer: Trainer) -> None:
        if getattr(self.precision_plugin, "scaler", None) is not None:
            raise EffAdamError(
                f"Update mode cannot run with precision {self.precision_plugin.precision!r}: its "
                "gradient scaler would rescale finished updates. Use bf16-mixed, or an optimizer "
                "other than EfficientAdam."
            )
        bound = trainer.gradient_clip_val
        if not bound:
            return
        if trainer.gradient_clip_algorithm not in (None, "norm"):
            raise EffAdamError(
                f"Update mode cannot clip gradients by {trainer.gradient_clip_algorithm.value!r}: "
                "after the exchange there are only updates. Use gradient_clip_algorithm='norm'."
            )
        if optimizer.max_grad_norm not in (None, bound):
            raise EffAdamError(
                f"Trainer(gradient_clip_val={bound}) and EfficientAdam(max_grad_norm="
                f"{optimizer.max_grad_norm}) differ. Set only one of them."
            )
        optimizer.max_grad_norm = float(bound)
        # Lightning would clip again after the exchange; teardown restores the value.
        self._clipping_moved = trainer, bound
        trainer.gradient_clip_val = None

    def _start_exchange(self, optimizer: Optimizer | None) -> None:
        before, model_before = self._hook_state, self._trained and self._trained()
        self._hook_state = state = attach(  # [3]
            self.model,
            optimizer=optimizer,
            grad_scaler=getattr(self.precision_plugin, "scaler", None),
            **self._node_options,
            **self._hook_options,
        )
        state.session.mode.expect_saving()
        config = state.config
        rank_zero_info(
            f"Efficient-Adam is {'on' if state.enabled else 'off'}: up {config.worker_quantizer}, "
            f"down {config.server_quantizer}, topology {state.session.topology.name}."
        )
        if before is not None and model_before is self.lightning_module:
            if not self._hook_options["auto"]:
                state.enabled = before.enabled
            if not self._weights_replaced:
                self._continue_from(before, state)  # [4]
        self._trained = weakref.ref(self.lightning_module)
        self._weights_replaced = False

    def _continue_from(self, before: EfficientAdamState, state: EfficientAdamState) -> None:
        saved = before.state_dict()
        if any(isinstance(one, EfficientAdam) for one in self.optimizers):
            # Every fit has new optimizers, whose moments start from zero and need their warm-up again.
            own = state.state_dict()
            fresh = {"moments": own["moments"], "counters": own["counters"]}
            saved = with_checksum({**saved, **fresh})
        state.load_state_dict(saved)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore the optimizers and this rank's residuals."""
        super().load_optimizer_state_dict(checkpoint)
        if self._hook_state is not None:
            load_states(checkpoint, {MODEL: self._hook_state})  # [5]
        self._weights_replaced = False

    def save_checkpoint(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint with the residuals of all ranks; every rank must call this."""
        # A checkpoint without optimizers is for inference only.
        if self._hook_state is not None and "optimizer_states" in checkpoint:
            checkpoint.update(saved_states({MODEL: self._hook_state}))  # [6]
        super().save_checkpoint(checkpoint, *args, **kwargs)

    def teardown(self) -> None:
        """Unwrap the model and end the exchange."""
        if self._hook_state is not None:
            self._hook_state.close()  # [7]
        if self._clipping_moved is not None:
            trainer, bound = self._clipping_moved
            trainer.gradient_clip_val = bound
            self._clipping_moved = None
        super().teardown()

    def __getstate__(self) -> dict[str, Any]:
        # For launchers that pickle the strategy: threads and process groups cannot be pickled.
        state: dict[str, Any] = super().__getstate__()
        return {**state, "_hook_state": None, "_trained": None, "_clipping_moved": None}


def register_strategies(registry: Any, strategy: type) -> None:
    """Register the names of a strategy for ``Trainer(strategy="...")``.

    Args:
        registry: Registry of a family.
        strategy: Strategy of the same family.
    """
    for name, start_method in (
        ("effadam", "popen"),
        ("effadam_spawn", "spawn"),
        ("effadam_fork", "fork"),
        ("effadam_notebook", "fork"),
    ):
        for suffix, options in (
            ("", {}),
            ("_find_unused_parameters_false", {"find_unused_parameters": False}),
            ("_find_unused_parameters_true", {"find_unused_parameters": True}),
        ):
            if name + suffix not in registry:
                registry.register(
                    name + suffix,
                    strategy,
                    description=f"DDP with quantized communication, processes by {start_method}",
                    start_method=start_method,
                    **options,
                )
