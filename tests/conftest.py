"""Fixtures and settings of the whole suite."""

from __future__ import annotations

import os
import random
import signal

# Before torch loads OpenMP: tests share few cores, and one thread gives one order of summation.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

import harness

if not torch.cuda.is_available():
    # Triton decides when functions are decorated, and any test may be the first to import it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("suite")
torch.set_num_threads(1)
# A suite that was started in the background ignores Ctrl-C, and so would the processes it starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _same_seed_for_every_test() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(name="ranks")
def _ranks() -> object:
    """`harness.run_ranks`, for tests that need several real processes."""
    return harness.run_ranks
