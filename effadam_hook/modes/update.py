"""Update mode: Efficient-Adam as published."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from effadam_hook.errors import EffAdamError, warn_caller
from effadam_hook.feedback.moments import MOMENTS
from effadam_hook.feedback.parameters import shaped_view
from effadam_hook.kernels.arguments import compute_dtype
from effadam_hook.kernels.fusions import ADAM_TERMS, AdamSource
from effadam_hook.modes.mode import Content, Mode
from effadam_hook.optim.efficient_adam import EfficientAdam
from effadam_hook.optim.groups import group_settings
from effadam_hook.optim.matching import Matching
from effadam_hook.optim.moment_states import is_local
from effadam_hook.wire.layout import Slot
from effadam_hook.wire.node_layout import Run
from effadam_hook.wire.node_shares import NodeShare

__all__ = ["UpdateContent", "UpdateMode"]


class UpdateMode(Mode):
    """Exchange of every worker's Adam update.

    Args:
        optimizer: The attached optimizer, which has the moments and applies the result.

    Attributes:
        optimizer: The same.
        differing: Parameters whose moments may differ between the ranks.
    """

    name = "update"
    units = "updates"
    scales_with_loss = False

    def __init__(self, optimizer: EfficientAdam) -> None:
        self.optimizer = optimizer
        self.max_grad_norm = optimizer.max_grad_norm
        self.differing: set[Tensor] = set(optimizer.state)
        self._recursion = optimizer.recursion
        self._generation = self._recursion.generation
        self._joins = False

    @property
    def matches(self) -> bool:
        """Return whether steps are matched to those of DDP with AdamW."""
        return self.optimizer.second_moment == "matched"

    @property
    def generation(self) -> int:  # type: ignore[override]
        """Return a number that changes when a loaded state has replaced the moments."""
        return self._recursion.generation

    def wire_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of the moments."""
        return compute_dtype(dtype)

    def content(
        self,
        parameters: Sequence[Tensor],
        slots: Sequence[Slot],
        dtype: torch.dtype,
        runs: Sequence[Run],
    ) -> Content:
        """Create a content with the moments of the bucket, in the order of the bucket."""
        return UpdateContent(self, parameters, slots, dtype, runs)

    def divide(self, share: NodeShare | None) -> None:
        """Advance the moments of this rank's share only."""
        self._recursion.share = share

    def connect(self, workers: int, energy: float) -> None:
        """Match the steps to those of DDP, if the optimizer requires it."""
        if self.matches:
            self._recursion.matching = Matching(workers, energy)

    def begin_backward(self, joins: bool) -> None:
        """Drop the results that no step has applied."""
        self._joins = joins
        self._recursion.pending.clear(joins)
        if self._generation != self._recursion.generation:  # ranks may have loaded different states
            self._generation = self._recursion.generation
            self.differing.update(self.optimizer.state)

    def begin_dense(self, parameters: Sequence[Tensor], buffer: Tensor) -> list[Tensor]:
        """Prepare a dense average; the first one after compressed steps averages moments, too."""
        if buffer.is_sparse:
            raise EffAdamError(
                f"A bucket of shape {tuple(buffer.shape)} has a sparse gradient. In update mode "
                "gradients must be dense, as in torch.optim.Adam: use sparse=False in the embedding, "
                "or gradient mode with SparseAdam."
            )
        moments = []
        start = 0
        for parameter in parameters:
            mean = None
            if self._joins:
                mean = shaped_view(buffer[start : start + parameter.numel()], parameter)
            start += parameter.numel()
            self._recursion.pending.deliver_mean(parameter, mean)
            if parameter in self.differing:
                state = self._recursion.widen_moments(parameter)
                moments += [state[key] for key in MOMENTS if key in state]
        self.differing.difference_update(parameters)
        return moments

    def end_backward(self) -> None:
        """Record the gradients that DDP has written."""
        self._recursion.pending.record_gradients()

    def end_without_backward(self) -> None:
        """Step at once: the training loop of a rank without data does not."""
        self._recursion.step_without_backward()

    def describe(self) -> dict[str, Any]:
        """Return the settings and the step counts of the optimizer."""
        optimizer = self.optimizer
        return {
            "second_moment": optimizer.second_moment,
            "refresh_every": optimizer.refresh_every,
            "max_grad_norm": optimizer.max_grad_norm,
            "bias_correction": optimizer.bias_correction,
            "schedule": repr(optimizer.schedule),
            "steps": _range({state["step"] for state in optimizer.state.values() if state}),
            **group_settings(optimizer),
        }

    def progress(self) -> int:
        """Return a digest of the step counts of all parameters, in the order of the optimizer."""
        states = [
            self.optimizer.state.get(p, {})
            for g in self.optimizer.param_groups
            for p in g["params"]
        ]
        return _digest([int(state.get("step", 0)) for state in states])

    def expect_saving(self) -> None:
        """Save the optimizer without a warning that the state of the hook is missing."""
        self._recursion.is_saved_by_hook = True

    def save(self) -> dict[str, dict[str, Any]]:
        """Return this rank's moments and step counts."""
        return self._recursion.save_moments()

    def load(self, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """Replace moments and step counts, and have the buckets use them."""
        if self.matches and any(map(is_local, saved.values())):
            warn_caller(
                'The saved moments are those of second_moment="local". From now on steps are matched '
                "to those of DDP with AdamW, and up to √N longer with N workers. Use the learning rate "
                'of DDP with AdamW, or second_moment="local" to continue as before.',
            )
        self._recursion.load_moments(saved)
        self.differing.update(self.optimizer.state)


class UpdateContent(Content):
    """The moments of one bucket, its update, and the terms of the current step.

    Args:
        mode: The mode, with the optimizer.
        parameters: The parameters of the bucket.
        slots: Their positions in it.
        bucket_dtype: The dtype of the bucket.
        runs: The elements that this rank encodes.
    """

    def __init__(
        self,
        mode: UpdateMode,
        parameters: Sequence[Tensor],
        slots: Sequence[Slot],
        bucket_dtype: torch.dtype,
        runs: Sequence[Run],
    ) -> None:
        self._mode = mode
        self._recursion = mode.optimizer.recursion
        self._parameters = list(parameters)
        self._slots = list(slots)
        numel = sum(slot.numel for slot in slots)
        dtype, device = mode.wire_dtype(bucket_dtype), parameters[0].device
        # A bucket in the dtype of the moments can contain the update itself, which becomes ``.grad``.
        self._update: Tensor | None = None
        if self.sends_weights or bucket_dtype != dtype:
            self._update = torch.zeros(numel, dtype=dtype, device=device)
        moments_numel = sum(run.numel for run in runs)
        flats = {key: torch.zeros(moments_numel, dtype=dtype, device=device) for key in MOMENTS}
        places = {run.slot: slice(run.local, run.local + run.numel) for run in runs}
        self._flats = [
            {key: flat[places.get(index, slice(0))] for key, flat in flats.items()}
            for index in range(len(slots))
        ]
        self._placed: list[Tensor | None] = [None] * len(slots)
        self._place_moments()
        self._address = -1
        self._results: dict[Tensor, Tensor] = {}
        terms = torch.zeros(len(slots), len(ADAM_TERMS), dtype=torch.float64, device="cpu")
        self.adam = AdamSource(flats["exp_avg"], flats["exp_avg_sq"], terms)

    def begin(self) -> None:
        """Compute the terms of the step."""
        assert self.adam is not None
        self._place_moments()
        self.averages_first = self._recursion.needs_mean(self._parameters)
        rows = [self._recursion.prepare(p, self.averages_first) for p in self._parameters]
        self.adam.terms.copy_(torch.tensor(rows, dtype=torch.float64, device="cpu"))
        self._mode.differing.update(self._parameters)
        states = self._mode.optimizer.state
        self.progress = _digest([states[p]["step"] for p in self._parameters])

    def target(self, bucket: Tensor) -> Tensor:
        """Return the bucket, or a buffer if it has another dtype than the update."""
        return bucket if self._update is None else self._update

    def finish(self, bucket: Tensor) -> None:
        """Deliver the update for the next optimizer step, and write it to the bucket."""
        # Delivered apart from the bucket: DDP leaves ``.grad`` unchanged for parameters that no rank
        # used, whatever the bucket contains.
        if self._update is not None:
            bucket.copy_(self._update)
        self._recursion.pending.deliver(self._views(self.target(bucket)))

    def withdraw(self, parameter: Tensor) -> None:
        """Drop the update of a parameter that no rank used."""
        self._recursion.withdraw(parameter)

    def _place_moments(self) -> None:
        """Move moments into the buffers of the bucket, unless they are there."""
        # Dense steps make the moments of a share whole, in tensors of their own.
        for index, parameter in enumerate(self._parameters):
            state = self._recursion.init_state(parameter)
            if state["exp_avg"] is not self._placed[index]:
                self._recursion.place_moments(parameter, self._flats[index])
                self._placed[index] = state["exp_avg"]

    def _items(self) -> list[tuple[Tensor, Slot]]:
        return list(zip(self._parameters, self._slots, strict=True))

    def _views(self, result: Tensor) -> dict[Tensor, Tensor]:
        """Return views of the result by parameter; cached while DDP passes the same buffer."""
        # The views keep the buffer alive, so that no other buffer can have its address.
        if result.data_ptr() != self._address:
            self._address = result.data_ptr()
            self._results = {
                parameter: shaped_view(result[slot.start : slot.start + slot.numel], parameter)
                for parameter, slot in self._items()
            }
        return self._results


def _digest(steps: Sequence[int]) -> int:
    return zlib.crc32(array("q", map(int, steps)))


def _range(steps: set[int]) -> str:
    """Return the range of the step counts of all parameters, as text."""
    if len(steps) < 2:
        return str(min(steps, default=0))
    return f"{min(steps)} to {max(steps)}"
