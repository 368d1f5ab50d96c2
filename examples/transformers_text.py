"""The text example with Hugging Face's Trainer: the marked line is the change.

    python examples/transformers_text.py                     # starts two workers on the CPU
    torchrun --nproc-per-node 2 examples/transformers_text.py
    python examples/transformers_text.py --no-effadam        # the Trainer's own DDP
    python examples/transformers_text.py --steps 80 --resume # continues from the last checkpoint

A tiny GPT-2 with random weights predicts the next byte; nothing is downloaded. The callback attaches
the hook, and adds the residuals of all ranks to the Trainer's checkpoints and its values to the log.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
from accelerate import debug_launcher
from train_text import Text, TextOptions
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from effadam_hook.integrations.transformers import EfficientAdamCallback

CONTEXT = 64
SAMPLES = 4096


def samples() -> list[dict[str, list[int]]]:
    """Draw windows of the text; the model shifts the labels itself."""
    text = Text(TextOptions(None, 1_000_000, context=CONTEXT, layers=2, width=64, heads=4))
    inputs, _ = text.sample(np.random.default_rng(0), SAMPLES)
    return [{"input_ids": row, "labels": row} for row in inputs.tolist()]


def main(options: argparse.Namespace) -> None:
    set_seed(0)
    config = GPT2Config(
        vocab_size=256,
        n_positions=CONTEXT,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    trainer = Trainer(
        model=GPT2LMHeadModel(config),
        args=TrainingArguments(
            output_dir=str(options.output),
            per_device_train_batch_size=8,
            max_steps=options.steps,
            learning_rate=4e-3,
            logging_steps=20,
            save_steps=options.save_steps,
            bf16=options.bf16,
            use_cpu=options.cpu,
            ddp_find_unused_parameters=False,
            report_to=[],
        ),
        train_dataset=samples(),
        callbacks=[  # <- the change
            EfficientAdamCallback(enabled=options.effadam, quantizer=options.quantizer)
        ],
    )
    trainer.train(resume_from_checkpoint=options.resume or None)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="see the top of this file")
    parser.add_argument("--effadam", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--quantizer", default="lloyd4")
    parser.add_argument("--cpu", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--steps", type=int, default=40, help="total optimizer steps")
    parser.add_argument("--save-steps", type=int, default=40, help="steps between checkpoints")
    parser.add_argument("--output", type=Path, default=Path("outputs/transformers_text"))
    parser.add_argument(
        "--resume", action="store_true", help="from the last checkpoint in --output"
    )
    return parser.parse_args()


if __name__ == "__main__":
    if "RANK" in os.environ:
        main(read_options())
    else:
        debug_launcher(main, (read_options(),), num_processes=2)
