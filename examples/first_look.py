"""Training of first_look.ipynb: handwritten digits on several workers, once for each mode.

New processes import the function that they run, which they cannot if a notebook defines it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from common.launch import Worker
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from effadam_hook import attach
from effadam_hook.run_log import RunLog


def train(worker: Worker, modes: dict[str, dict[str, Any]], steps: int, folder: Path) -> None:
    """Train once for each mode, and write a log of each run into `folder`."""
    images, digits = map(torch.tensor, load_digits(return_X_y=True))
    images = images.float() / 16
    train_set, test_set = slice(0, 1500), slice(1500, None)
    for name, options in modes.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 10))
        ddp_model = DistributedDataParallel(model)
        state = attach(ddp_model, **options)  # the one line that compresses
        optimizer = torch.optim.AdamW(ddp_model.parameters(), lr=3e-3)
        batches = torch.Generator().manual_seed(worker.rank)  # each worker draws its own data
        with RunLog(folder / f"{name}.jsonl", enabled=worker.is_main) as log:
            for step in range(1, steps + 1):
                batch = torch.randint(train_set.stop, (32,), generator=batches)
                loss = nn.functional.cross_entropy(ddp_model(images[batch]), digits[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    logits = model(images[test_set])
                test_loss = nn.functional.cross_entropy(logits, digits[test_set])
                accuracy = (logits.argmax(1) == digits[test_set]).float().mean()
                log.write(step, test_loss, accuracy=accuracy, **state.stats())
