"""A training script for the launcher tests: ``lightning_script.py STRATEGY``, two processes.

The strategy ``spawn`` starts them by spawn, and names each of them a node.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import lightning.pytorch
from torch import Tensor, nn, optim

import lightning_plugin
from lightning_training import loader, make_trainer, network


class Module(lightning.pytorch.LightningModule):
    """At the top level, as a launcher that pickles needs it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.mse_loss(self.body(batch[0]), batch[1])

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=3e-3)

    def on_train_end(self) -> None:
        strategy: Any = self.trainer.strategy
        hook = strategy.model._get_ddp_logging_data()["comm_hook"]
        # At once and in one piece: the processes share the terminal.
        state = strategy.hook_state
        nodes = len(state.session.connection.choice.table.nodes)
        line = f"rank {self.global_rank} {hook} {state.steps} {nodes} nodes\n"
        os.write(1, line.encode())


if __name__ == "__main__":
    chosen: Any = sys.argv[1]
    os.environ.setdefault("LOCAL_WORLD_SIZE", "2")
    if chosen == "spawn":
        chosen = lightning_plugin.EfficientAdamStrategy(start_method="spawn", device_mesh=(2, 1))
    make_trainer(lightning.pytorch, chosen, ".").fit(Module(), loader())
