"""The results of the exchange stay the same to the bit; see bits.py."""

from __future__ import annotations

import json

import pytest

from bits import PATH, RUNS, environment, key, run_of
from harness import run_ranks
from kernel_cases import needs_library

RECORDED = json.loads(PATH.read_text())


@needs_library  # the digests watch what the compiled kernels encode
@pytest.mark.parametrize(("quantizer", "world_size", "topology"), RUNS)
def test_payloads_residuals_and_weights_after_50_steps_are_the_recorded_ones(
    quantizer: str, world_size: int, topology: str
) -> None:
    recorded_for = {name: RECORDED[name] for name in environment()}
    if recorded_for != environment():
        pytest.skip(f"recorded for {recorded_for}, and this is {environment()}")
    runs = run_ranks(run_of, world_size, quantizer, topology, timeout=120)
    assert runs == RECORDED["runs"][key(quantizer, world_size, topology)]
