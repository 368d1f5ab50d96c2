"""The exchange of a model that Hugging Face Accelerate has wrapped in DDP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from effadam_hook.attach import attach
from effadam_hook.config.options import HookOptions
from effadam_hook.errors import EffAdamError, warn_caller
from effadam_hook.integrations.metrics import log_exchange
from effadam_hook.state import EfficientAdamState

if TYPE_CHECKING:
    from accelerate import Accelerator
    from typing_extensions import Unpack

__all__ = ["AcceleratedExchange"]


class AcceleratedExchange:
    """Attach the hook to a prepared model, and save its state with ``Accelerator.save_state``.

    On one process nothing is attached, and every method has no effect. The loss scale of
    ``mixed_precision="fp16"`` is followed.

    Args:
        accelerator: The accelerator. The object registers itself for its checkpoints, which hold the
            states of all ranks and load on any number of ranks.
        model: The model that ``accelerator.prepare`` has returned.
        optimizer: The prepared optimizer, where :func:`effadam_hook.attach` needs it.
        **options: Options of :class:`effadam_hook.config.options.HookOptions`.

    Attributes:
        state: The state of the hook; None on one process.

    Raises:
        EffAdamError: If there are several processes, and the model is not wrapped in DDP.

    Example:
        >>> model, optimizer = accelerator.prepare(model, optimizer)
        >>> exchange = AcceleratedExchange(accelerator, model, quantizer="lloyd4")
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        **options: Unpack[HookOptions],
    ) -> None:
        self.state: EfficientAdamState | None = None
        self._accelerator = accelerator
        if accelerator.num_processes > 1:
            self.state = attach_to_prepared(model, optimizer, accelerator.scaler, options)
        accelerator.register_for_checkpointing(self)

    def log(self, step: int) -> None:
        """Log the values of the exchange to the accelerator's trackers; call it on all ranks.

        Args:
            step: Step of the trackers.
        """
        if self.state is not None and self._accelerator.is_main_process:
            log_exchange(self._accelerator, self.state, step)

    def state_dict(self) -> dict[str, Any]:
        """Gather the states of all ranks on rank 0; Accelerate calls this on every rank."""
        return {} if self.state is None else self.state.full_state_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore the state of this rank; Accelerate calls this on every rank.

        Args:
            saved: The result of :meth:`state_dict` on rank 0.
        """
        restore_or_warn(self.state, saved)


def attach_to_prepared(
    model: nn.Module, optimizer: Any, scaler: Any, options: HookOptions
) -> EfficientAdamState:
    """Attach the hook to a model that Accelerate has prepared on several processes.

    Args:
        model: The model, in DDP, also inside torch.compile.
        optimizer: The optimizer, or None.
        scaler: The GradScaler, or None.
        options: Options of the hook.

    Returns:
        The state.

    Raises:
        EffAdamError: If the model is not wrapped in DDP.
    """
    try:
        state = attach(model, optimizer=optimizer, grad_scaler=scaler, **options)
    except TypeError as error:
        if not str(error).startswith("Invalid ddp_model"):
            raise
        raise EffAdamError(
            f"{error} Accelerate wraps a prepared model in DDP on several processes, except with "
            "DeepSpeed, FSDP, tensor parallelism or a launcher that it does not know."
        ) from error
    state.session.mode.expect_saving()
    return state


def restore_or_warn(state: EfficientAdamState | None, saved: Mapping[str, Any]) -> None:
    """Load a saved state of all ranks; warn if there is nothing to load, or nothing to load it into.

    Args:
        state: The state; None on one process.
        saved: The saved state; empty if it was saved on one process.
    """
    if state is not None and saved:
        state.load_state_dict(saved)
    elif state is not None:
        warn_caller(
            "The checkpoint holds no state of the compressed exchange: it was written without it, or "
            "on one process. The residuals start at zero.",
        )
    elif saved:
        warn_caller(
            "The checkpoint holds the residuals of several ranks, and one process exchanges nothing: "
            "they are dropped.",
        )
