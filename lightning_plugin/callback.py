"""What the exchange does, in the logger and on the progress bar."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from effadam_hook import EfficientAdamState
from lightning_plugin.families import installed

if TYPE_CHECKING:
    from lightning.pytorch import Callback as Base
    from lightning.pytorch import LightningModule, Trainer
else:
    _modules = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}
    # Callbacks have no state of their own, so one class can be both families'.
    Base = type("Base", tuple(import_module(_modules[name]).Callback for name in installed()), {})

__all__ = ["CompressionMonitor"]


class CompressionMonitor(Base):
    """Logs the exchange of rank 0, whenever the Trainer logs (``log_every_n_steps``).

    With the prefix, these are:

    - ``ratio``: how many times less than uncompressed gradients has travelled so far;
    - ``uplink_bytes``, ``downlink_bytes``: of one worker, both since the start of training;
    - ``worker_residual_norm``, ``server_residual_norm``: 2-norms of what was not sent yet;
    - ``quantization_error``: the worker residual's norm over that of the result of the exchange. It
      rises where a quantizer is too coarse, and levels off where error feedback keeps up;
    - ``exchange_s``: seconds of the last exchange, from handing over the first bucket to having
      decoded the last. Backward runs at the same time.

    Steps in between cost nothing; a logging step waits for the device.

    Args:
        prefix: Before the names.
        prog_bar: Whether ``ratio`` and ``quantization_error`` are shown on the progress bar.

    Example:
        >>> trainer = Trainer(strategy="effadam", callbacks=[CompressionMonitor()])
    """

    def __init__(self, prefix: str = "effadam/", prog_bar: bool = True) -> None:
        super().__init__()
        self._prefix = prefix
        self._prog_bar = prog_bar
        self._result_norm = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if there is nothing to monitor."""
        if _state(trainer) is None:
            rank_zero_warn(
                f"CompressionMonitor has nothing to monitor: the strategy is a "
                f"{type(trainer.strategy).__name__}. It needs an EfficientAdamStrategy."
            )

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the result of the exchange before anyone changes it."""
        # Not after the step: gradients may be clipped, unscaled or gone by then.
        if _state(trainer) is not None and self._logs(trainer):
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            norms = [gradient.float().norm() for gradient in gradients]
            self._result_norm = float(torch.stack(norms).norm()) if norms else 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        """Log."""
        state = _state(trainer)
        if state is None or not self._logs(trainer):
            return
        stats = state.stats()
        del stats["steps"], stats["dense_bytes"]
        error = stats["worker_residual_norm"] / self._result_norm if self._result_norm else 0.0
        shown = {"ratio": stats.pop("ratio"), "quantization_error": error}
        for values, prog_bar in ((stats, False), (shown, self._prog_bar)):
            pl_module.log_dict(
                {self._prefix + name: float(value) for name, value in values.items()},
                prog_bar=prog_bar,
                rank_zero_only=True,
            )

    def _logs(self, trainer: Trainer) -> bool:
        logs: bool = trainer.is_global_zero and trainer._logger_connector.should_update_logs
        return logs


def _state(trainer: Trainer) -> EfficientAdamState | None:
    return getattr(trainer.strategy, "hook_state", None)
