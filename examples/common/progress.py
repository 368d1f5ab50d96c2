"""Progress of a run: a bar in a terminal, and one line per evaluation."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

if TYPE_CHECKING:
    from effadam_hook import EfficientAdamState

    from .training import Point, Run, Task

REFRESH_EVERY_STEPS = 10


class Progress:
    """Progress display of the main worker; other workers print nothing."""

    def __init__(
        self, run: Run, task: Task, steps: int, enabled: bool, device: torch.device
    ) -> None:
        self._run = run
        self._task = task
        self._steps = steps
        self._enabled = enabled
        self._width = len(str(steps))
        first = run.points[-1].step if run.points else 0
        self._refreshed = (time.perf_counter(), first)
        is_shown = torch.tensor(enabled and sys.stderr.isatty(), dtype=torch.int64, device=device)
        dist.broadcast(is_shown, 0)
        self._is_shown = bool(
            is_shown
        )  # the same on all workers, which describe the exchange together
        self._bar = tqdm(
            total=steps,
            initial=first,
            desc=run.mode,
            unit="step",
            disable=not (enabled and self._is_shown),
            dynamic_ncols=True,
            leave=False,
        )

    def step(self, step: int, loss: Tensor, state: EfficientAdamState | None) -> None:
        """Advance the bar; every few steps, show this worker's loss, throughput and the exchange."""
        if not self._is_shown:
            return
        self._bar.update()
        if step % REFRESH_EVERY_STEPS:
            return
        exchange = ""
        if state is not None:
            from effadam_hook.integrations.metrics import exchange_line

            exchange = f", {exchange_line(state)}"
        now = time.perf_counter()
        then, step_then = self._refreshed
        self._refreshed = (now, step)
        throughput = (step - step_then) * self._run.units_per_step / (now - then)
        self._bar.set_postfix_str(
            f"loss {loss.item():.3f}, {throughput:,.0f} {self._task.unit}/s{exchange}"
        )

    def point(self, point: Point) -> None:
        """Print the results of an evaluation in one line."""
        throughput = point.step * self._run.units_per_step / point.seconds
        self.message(
            f"{self._run.mode:<12} step {point.step:>{self._width}}/{self._steps}"
            f"  train loss {point.train_loss:.4f}"
            f"  {self._task.held_out_name} loss {point.loss:.4f}"
            f"  accuracy {point.accuracy:.1%}"
            f"  {throughput:,.0f} {self._task.unit}/s"
            f"  {(point.uplink_bytes + point.downlink_bytes) / 1e6:,.1f} MB"
        )

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        if self._enabled:
            self._bar.write(text)
            sys.stdout.flush()

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()
