"""The Trainer's side: when the state is made, registered, saved, restored and handed on.

A fit goes through these steps; those of Lightning are in brackets::

    Trainer(strategy=...)        [1] options are checked; there is no process group yet
    (process group starts)
    load_checkpoint              [2] weights will be those of a checkpoint: old residuals are void
    setup  (wraps in DDP,        [3] the state is made and its hook registered, on any device
            makes optimizers)    [4] the fit before, if of the same model, hands its residuals on
    load_optimizer_state_dict    [5] a checkpoint's residuals replace them
    (training)
    save_checkpoint              [6] every rank's residuals go into the one file of rank 0
    teardown (unwraps)           [7] the exchange ends; the state can still be asked and saved
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info
from torch.optim import Optimizer

from effadam_hook import EffAdamError, EfficientAdam, EfficientAdamState, attach
from effadam_hook.feedback.checksum import with_checksum
from lightning_plugin.checkpointing import load_states, saved_states
from lightning_plugin.families import Adaptable
from lightning_plugin.options import check_ddp_options, check_hook_options, exchanged_optimizer

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy as Base
else:
    Base = object  # the mixed-in class is that of either family

__all__ = ["StrategyMixin", "register_strategies"]

MODEL = "model"
"""The name under which a checkpoint holds the state; a Trainer has one model."""


class StrategyMixin(Adaptable, Base):
    """DDP for a Trainer, with the two-way quantized exchange in place of the all-reduce.

    Takes all options of :class:`effadam_hook.EfficientAdamState`, and every argument of Lightning's
    ``DDPStrategy`` and of torch's ``DistributedDataParallel``. The communication hook is registered
    on CPU as on CUDA. If ``configure_optimizers`` returns an :class:`effadam_hook.EfficientAdam`,
    updates are exchanged in place of gradients.

    Args:
        quantizer: Name of the quantizer of both directions, see
            :data:`effadam_hook.wire.quantizers.QUANTIZERS`.
        worker_quantizer: The uplink's, if it is to differ.
        server_quantizer: The downlink's, if it is to differ.
        block_size: Elements that share a scale, a power of two from 16 to 4096.
        topology: ``"rank0"`` (rank 0 is the server), ``"sharded"`` (every rank, for its share) or
            ``"auto"`` (whichever is faster on this link).
        error_feedback: Whether what quantization dropped is added to the next step, on both sides.
        exact: Rules for parameters that travel uncompressed: ``"1d"``, ``"<N"`` (fewer than N
            elements), or shell patterns for names, such as ``"*.norm*"``.
        warmup_steps: Backward passes with a dense all-reduce before compression starts.
        enabled: Whether to compress at all; see ``hook_state.enabled`` for switching later.
        auto: Whether to time some dense and some compressed steps first and keep the faster kind, see
            :func:`effadam_hook.attach`.
        scale_rule: How a block finds its scale, ``"least_squares"`` or ``"absmax"``.
        wait_timeout_s: Seconds after which a bucket that waits for other ranks is an error; None waits
            for the process group's time-out.
        precondition: Whether to quantize the gradient in units of the root of the second moment of
            the model's ``torch.optim.Adam`` or ``AdamW``, which is worth about one bit.
        quantize_weights: With an ``EfficientAdam``: whether the servers send the weights instead of
            updates, quantized by ``server_quantizer``, as Quantized Adam does.
        **ddp_options: Arguments of Lightning's ``DDPStrategy`` and ``DistributedDataParallel``:
            ``find_unused_parameters``, ``process_group_backend`` or ``start_method``.

    Raises:
        ValueError: If an option has no such value, or cannot be combined with compression.
        TypeError: If an option is unknown or has the wrong type.

    Example:
        >>> trainer = Trainer(strategy=EfficientAdamStrategy(quantizer="lloyd4"), devices=2)
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
        check_hook_options(hook_options, mode_options)  # [1]
        check_ddp_options(ddp_options, self.lightning_base, {*hook_options, *mode_options})
        self._arguments = {**hook_options, **mode_options, **ddp_options}
        self._mode_options = mode_options
        self._hook_options = hook_options
        self._hook_state: EfficientAdamState | None = None
        self._trained: weakref.ref[LightningModule] | None = None
        self._weights_replaced = False
        self._clipping_moved: tuple[Trainer, float] | None = None
        super().__init__(**ddp_options)

    @property
    def hook_state(self) -> EfficientAdamState | None:
        """The state of the running fit, or of the last one; None before the first."""
        return self._hook_state

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint; see the base class."""
        self._weights_replaced = True  # [2]
        checkpoint: dict[str, Any] = super().load_checkpoint(*args, **kwargs)
        return checkpoint

    def setup(self, trainer: Trainer) -> None:
        """Wrap the model, make the optimizers, and register the hook if this is a fit."""
        super().setup(trainer)
        if trainer.state.fn == "fit":
            optimizer = exchanged_optimizer(self.optimizers, self._mode_options)
            if isinstance(optimizer, EfficientAdam):
                self._prepare_update_mode(optimizer, trainer)
            self._start_exchange(optimizer)

    def _prepare_update_mode(self, optimizer: EfficientAdam, trainer: Trainer) -> None:
        if getattr(self.precision_plugin, "scaler", None) is not None:
            raise EffAdamError(
                f"Update mode cannot run with precision {self.precision_plugin.precision!r}: its "
                "gradient scaler would rescale finished updates. Use bf16-mixed, or another "
                "optimizer than EfficientAdam."
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
        # Lightning would clip once more, after the exchange; teardown gives it back.
        self._clipping_moved = trainer, bound
        trainer.gradient_clip_val = None

    def _start_exchange(self, optimizer: Optimizer | None) -> None:
        before, model_before = self._hook_state, self._trained and self._trained()
        self._hook_state = state = attach(  # [3]
            self.model,
            optimizer=optimizer,
            grad_scaler=getattr(self.precision_plugin, "scaler", None),
            **self._mode_options,
            **self._hook_options,
        )
        config = state.config
        rank_zero_info(
            f"Efficient-Adam is {'on' if state.enabled else 'off'}: up {config.worker_quantizer}, "
            f"down {config.server_quantizer}, topology {config.topology}."
        )
        if before is not None and model_before is self.lightning_module:
            if not self._hook_options["auto"]:
                state.enabled = before.enabled
            if not self._weights_replaced:
                self._hand_on(before, state)  # [4]
        self._trained = weakref.ref(self.lightning_module)
        self._weights_replaced = False

    def _hand_on(self, before: EfficientAdamState, state: EfficientAdamState) -> None:
        saved = before.state_dict()
        if any(isinstance(one, EfficientAdam) for one in self.optimizers):
            # Every fit has new optimizers, and moments that start anew need their warm-up again.
            own = state.state_dict()
            fresh = {"moments": own["moments"], "counters": own["counters"]}
            saved = with_checksum({**saved, **fresh})
        state.load_state_dict(saved)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore the optimizers, and this rank's residuals."""
        super().load_optimizer_state_dict(checkpoint)
        if self._hook_state is not None:
            load_states(checkpoint, {MODEL: self._hook_state})  # [5]
        self._weights_replaced = False

    def save_checkpoint(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint with the residuals of all ranks; every rank must call this."""
        # Without optimizers it is meant for inference only.
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
        # For launchers that pickle the strategy: threads and process groups stay where they are.
        state: dict[str, Any] = super().__getstate__()
        return {**state, "_hook_state": None, "_trained": None, "_clipping_moved": None}


def register_strategies(registry: Any, strategy: type) -> None:
    """Give a strategy the names under which ``Trainer(strategy="...")`` finds it.

    Args:
        registry: The registry of a family.
        strategy: Its strategy.
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
