"""Callback that compresses the communication of Hugging Face's Trainer.

The Trainer wraps the model when training starts. It passes its callbacks neither the wrapped model nor
the folder from which it resumes, and its checkpoints have no place for tensors of callbacks. The
callback therefore finds its Trainer among the living objects, and writes a file of its own into every
checkpoint. The Trainer saves an id with the states of callbacks, which identifies this file.
"""

from __future__ import annotations

import gc
import io
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from effadam_hook.config import Config
from effadam_hook.config.options import (
    HookOptions,
    accepts_options,
    complete_options,
    state_options,
)
from effadam_hook.errors import EffAdamError
from effadam_hook.exchange.collectives import device_of
from effadam_hook.exchange.waiting import gather_bytes
from effadam_hook.integrations.accelerate import attach_to_prepared, restore_or_warn
from effadam_hook.integrations.metrics import exchange_values
from effadam_hook.optim.efficient_adam import EfficientAdam
from effadam_hook.optim.wrappers import unwrapped
from effadam_hook.state import EfficientAdamState

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["FILE_NAME", "EfficientAdamCallback"]

FILE_NAME = "effadam_hook.pt"
"""File with the states of all ranks in a checkpoint folder."""


@accepts_options(HookOptions)
class EfficientAdamCallback(TrainerCallback, ExportableState):
    """Attach the hook when the Trainer has wrapped its model in DDP, save it and log it.

    On one process the callback has no effect. With ``Trainer(optimizers=(EfficientAdam(...), None))``
    it exchanges updates. Every checkpoint of the Trainer holds the states of all ranks in the file
    ``effadam_hook.pt``, which loads on any number of ranks. The values of
    :func:`effadam_hook.integrations.metrics.exchange_values` are added to what the Trainer logs.

    Args:
        prefix: Prefix of the logged names.
        **options: Options of :class:`effadam_hook.config.options.HookOptions`.

    Attributes:
        exchange: The state of the hook; None before training and on one process.

    Example:
        >>> trainer = Trainer(..., callbacks=[EfficientAdamCallback(quantizer="lloyd4")])
    """

    def __init__(self, *, prefix: str = "effadam/", **options: Unpack[HookOptions]) -> None:
        complete = complete_options(options, HookOptions, beside=("prefix",))
        Config.from_options(state_options(complete))  # raises errors before training starts
        self.exchange: EfficientAdamState | None = None
        self._prefix = prefix
        self._options = options
        self._model: torch.nn.Module | None = None
        self._optimizer: EfficientAdam | None = None
        self._id = ""

    def state(self) -> dict[str, Any]:
        """Return the entry of ``trainer_state.json``, with a new id for the next checkpoint."""
        self._id = secrets.token_hex(8)
        return {"args": {"prefix": self._prefix, **self._options}, "attributes": {"_id": self._id}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Attach the hook, and resume from the state in the checkpoint."""
        trainer = _trainer_of(self)
        # First of all callbacks, so that reporting callbacks get the values that on_log adds.
        handler = trainer.callback_handler
        handler.callbacks = [self, *(one for one in handler.callbacks if one is not self)]
        if args.world_size > 1:
            optimizer = unwrapped(objects.get("optimizer"), (EfficientAdam,))
            if isinstance(optimizer, EfficientAdam):
                _check_clipping(args.max_grad_norm)
                self._optimizer = optimizer
            elif not self._options.get("precondition"):
                optimizer = None
            self._attach(trainer, optimizer)
        if state.global_step:
            self._resume(args, state)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Accept the gradients again after the Trainer has measured their norm."""
        if (
            self._optimizer is not None
        ):  # it clips to infinity, which changes versions but no values
            self._optimizer.recursion.pending.record_gradients()

    def on_save(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Write the states of all ranks to the checkpoint."""
        if self.exchange is None:
            return
        saved = self.exchange.full_state_dict()
        if not state.is_world_process_zero:
            return
        folder = _folder(args.output_dir, state.global_step)
        if not folder.is_dir():
            raise EffAdamError(
                f"The Trainer has written no folder {str(folder)!r}, where the residuals belong. "
                "Hyperparameter search writes to other folders: train without checkpoints in it."
            )
        path = folder / FILE_NAME
        torch.save({"id": self._id, "exchange": saved}, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, Any] | None = None,
        **objects: Any,
    ) -> None:
        """Add the values of the exchange to those of a training step."""
        if self.exchange is None or not logs or "loss" not in logs:
            return
        if state.is_world_process_zero:
            values = exchange_values(self.exchange, self._prefix)
            logs.update(values)
            state.log_history[-1].update(values)

    def _attach(self, trainer: Trainer, optimizer: Any) -> None:
        model = trainer.model_wrapped
        if self._model is model:  # train() was called again, and kept the DDP model
            return
        if self.exchange is not None:
            self.exchange.close()
        scaler = trainer.accelerator.scaler
        self.exchange = attach_to_prepared(model, optimizer, scaler, self._options)
        self._model = model

    def _resume(self, args: Any, state: Any) -> None:
        written = _as_list(state.stateful_callbacks.get(type(self).__name__))
        ids = {one.get("attributes", {}).get("_id") for one in written} - {None, ""}
        given = args.resume_from_checkpoint
        folders = [Path(given)] if isinstance(given, str) else []
        folders.append(_folder(args.output_dir, state.global_step))
        data = b""
        if state.is_world_process_zero:
            data = next((data for folder in folders if (data := _read(folder, ids))), b"")
        if self.exchange is None:
            restore_or_warn(None, {"file": data} if data else {})
            return
        # From rank 0, because other hosts may not have the folder.
        session = self.exchange.session
        with session.connection.waiting("resuming the Trainer"):
            group = session.group
            data = gather_bytes(b"+" + data, group, device_of(group), everywhere=True)[0][1:]
        if not data and ids:
            searched = " or ".join(repr(str(folder)) for folder in folders)
            raise EffAdamError(
                f"The checkpoint of step {state.global_step} was written with residuals, and their "
                f"file {FILE_NAME} is not in {searched}. If the checkpoint is in another folder, set "
                "TrainingArguments(resume_from_checkpoint=folder); if it is incomplete, resume from an "
                "earlier one."
            )
        saved = torch.load(io.BytesIO(data), weights_only=True) if data else {"exchange": {}}
        restore_or_warn(self.exchange, saved["exchange"])


def _trainer_of(callback: EfficientAdamCallback) -> Trainer:
    """Return the Trainer that runs a callback."""
    for one in gc.get_objects():
        is_training = issubclass(type(one), Trainer) and one.is_in_train
        if is_training and callback in one.callback_handler.callbacks:
            trainer: Trainer = one
            return trainer
    raise EffAdamError(
        "No Trainer that trains has this callback. It must be in Trainer(callbacks=[...]), or be added "
        "by trainer.add_callback(...)."
    )


def _check_clipping(bound: float | None) -> None:
    if bound:
        raise EffAdamError(
            f"TrainingArguments(max_grad_norm={bound}) clips gradients after the exchange, where "
            "update mode has only updates. Set max_grad_norm=0, and clip with "
            "EfficientAdam(max_grad_norm=...)."
        )


def _read(folder: Path, ids: set[str]) -> bytes:
    """Return the file of a checkpoint with one of the ids; empty if there is none."""
    path = folder / FILE_NAME
    if not path.is_file():
        return b""
    data = path.read_bytes()
    saved = torch.load(io.BytesIO(data), weights_only=True)
    return data if saved["id"] in ids else b""


def _folder(output_dir: str, step: int) -> Path:
    return Path(output_dir, f"checkpoint-{step}")


def _as_list(value: Any) -> list[dict[str, Any]]:
    return value if isinstance(value, list) else [value] if isinstance(value, dict) else []
