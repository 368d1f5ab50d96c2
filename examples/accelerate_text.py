"""The text example with Hugging Face Accelerate: the marked lines are the change.

    python examples/accelerate_text.py                       # starts two workers on the CPU
    accelerate launch --num_processes 2 examples/accelerate_text.py
    python examples/accelerate_text.py --no-effadam          # Accelerate's own DDP
    python examples/accelerate_text.py --resume outputs/accelerate_text

Accelerate wraps the model in DDP and registers no communication hook by default. `AcceleratedExchange`
attaches the hook, follows the loss scale of fp16, and adds the residuals of all ranks to checkpoints.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, debug_launcher
from common.training import cross_entropy
from train_text import GPT, Text, TextOptions

from effadam_hook.integrations.accelerate import AcceleratedExchange

SIZES = {"context": 64, "layers": 2, "width": 64, "heads": 4}


class Progress:
    """Number of finished optimizer steps, saved with Accelerate's checkpoints."""

    step = 0

    def state_dict(self) -> dict[str, int]:
        """Return the step."""
        return {"step": self.step}

    def load_state_dict(self, saved: dict[str, int]) -> None:
        """Restore the step."""
        self.step = saved["step"]


def main(options: argparse.Namespace) -> None:
    accelerator = Accelerator(
        cpu=options.cpu, mixed_precision=options.mixed_precision, gradient_accumulation_steps=2
    )
    torch.manual_seed(0)
    task = Text(TextOptions(data=None, max_bytes=1_000_000, **SIZES))
    model = GPT(**SIZES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    exchange = AcceleratedExchange(  # <- the change
        accelerator, model, enabled=options.effadam, quantizer=options.quantizer
    )
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    if options.resume:
        accelerator.load_state(str(options.resume))
    first = progress.step
    for step in range(first, options.steps):
        for part in range(2):
            rng = np.random.default_rng([step, part, accelerator.process_index])
            inputs, targets = (t.to(accelerator.device) for t in task.sample(rng, 4))
            with accelerator.accumulate(model):
                loss = cross_entropy(model(inputs), targets)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        progress.step = step + 1
        is_shown = progress.step % 20 == 0 or progress.step == options.steps
        if is_shown and accelerator.is_main_process:
            ratio = exchange.state.stats()["ratio"] if exchange.state else 1.0
            print(f"step {progress.step}: loss {loss.item():.4f}, bytes / {ratio:.2f}")
    accelerator.save_state(str(options.checkpoint))
    accelerator.end_training()


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="see the top of this file")
    parser.add_argument("--effadam", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--quantizer", default="lloyd4")
    parser.add_argument("--cpu", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--steps", type=int, default=100, help="total optimizer steps")
    parser.add_argument("--checkpoint", type=Path, default=Path("outputs/accelerate_text"))
    parser.add_argument("--resume", type=Path, help="a checkpoint of this program")
    return parser.parse_args()


if __name__ == "__main__":
    if "RANK" in os.environ:
        main(read_options())
    else:
        debug_launcher(main, (read_options(),), num_processes=2)
