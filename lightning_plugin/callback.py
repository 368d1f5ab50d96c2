"""Callback that logs the exchange to the logger and the progress bar."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from effadam_hook import EfficientAdamState
from effadam_hook.integrations.metrics import exchange_values
from lightning_plugin.families import installed

if TYPE_CHECKING:
    from lightning.pytorch import Callback as Base
    from lightning.pytorch import LightningModule, Trainer
else:
    _modules = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}
    # The base classes have no state, so one class can derive from those of both families.
    Base = type("Base", tuple(import_module(_modules[name]).Callback for name in installed()), {})

__all__ = ["CompressionMonitor"]


class CompressionMonitor(Base):
    """Callback that logs the exchange of rank 0 when the Trainer logs (``log_every_n_steps``).

    The logged values are, with the prefix before their names:

    - ``ratio``: bytes of uncompressed gradients divided by the bytes sent since the start of training;
    - ``uplink_bytes``, ``downlink_bytes``: bytes of one worker since the start of training;
    - ``worker_residual_norm``, ``server_residual_norm``: 2-norms of the residuals;
    - ``quantization_error``: norm of the worker residual divided by the norm of the result of the
      exchange. It keeps increasing if the quantizer is too coarse, and remains stable if error
      feedback compensates the quantization error;
    - ``exchange_s``: seconds of the last exchange, from the start of the first bucket to the decoded
      last bucket. Backward runs concurrently.

    Steps without logging have no cost. A step with logging synchronizes the device.

    Args:
        prefix: Prefix of the names.
        prog_bar: Whether the progress bar shows ``ratio`` and ``quantization_error``.

    Examples:
        >>> trainer = Trainer(strategy="effadam", callbacks=[CompressionMonitor()])
    """

    def __init__(self, prefix: str = "effadam/", prog_bar: bool = True) -> None:
        super().__init__()
        self._prefix = prefix
        self._prog_bar = prog_bar

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if there is nothing to monitor."""
        if _state(trainer) is None:
            rank_zero_warn(
                f"CompressionMonitor has nothing to monitor: the strategy is a "
                f"{type(trainer.strategy).__name__}. It needs an EfficientAdamStrategy."
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        """Log the values."""
        state = _state(trainer)
        if state is None or not self._logs(trainer):
            return
        values = exchange_values(state, self._prefix)
        names = [self._prefix + name for name in ("ratio", "quantization_error")]
        shown = {name: values.pop(name) for name in names if name in values}
        for each, prog_bar in ((values, False), (shown, self._prog_bar)):
            pl_module.log_dict(each, prog_bar=prog_bar, rank_zero_only=True)

    def _logs(self, trainer: Trainer) -> bool:
        logs: bool = trainer.is_global_zero and trainer._logger_connector.should_update_logs
        return logs


def _state(trainer: Trainer) -> EfficientAdamState | None:
    return getattr(trainer.strategy, "hook_state", None)
