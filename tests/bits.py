"""Digests of what the exchange computes, for every quantizer, topology and mode.

``python tests/bits.py`` records them in ``data/bits.json``; ``test_bits.py`` compares. A change that
only moves or renames code leaves all of them as they are. One that changes the arithmetic on purpose
records them anew, and says so.

Each run makes 50 steps on 2 or 3 ranks, over DDP's rebuild of its buckets, with odd sizes, and is saved
and resumed in its middle. Gradients are multiples of a power of two, drawn as integers: they are
the same on every machine. So is the optimizer: Adam is torch's fused one, because ``torch.sqrt`` goes
through MKL, which rounds differently on processors of different makers.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effadam_hook import EfficientAdam, attach
from effadam_hook.kernels import cpu
from effadam_hook.wire.quantizers import QUANTIZERS
from harness import run_ranks
from training import ChosenGradients, ddp

__all__ = ["MODES", "PATH", "RUNS", "environment", "key", "record", "run_of"]

PATH = Path(__file__).parent / "data" / "bits.json"
SHAPES = ((37, 53), (53,), (1,), (61, 11), (7, 3, 5), (2, 259), (64, 40))
MODES = ("gradient", "preconditioned", "update", "weights")
# Every quantizer on three ranks, whose shares are uneven; four bits and one with one server, too.
RUNS = (
    *((name, size, "rank0") for name in ("lloyd4", "sign") for size in (2, 3)),
    ("lloyd4", 2, "sharded"),
    *((name, 3, "sharded") for name in QUANTIZERS),
)
_STEPS, _RESUMED = 50, 25


def environment() -> dict[str, str]:
    """The versions and the instruction set for which digests are recorded."""
    return {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}


def key(quantizer: str, world_size: int, topology: str) -> str:
    """The key of a run in ``data/bits.json``."""
    return f"{quantizer} on {world_size}, {topology}"


def run_of(rank: int, world_size: int, quantizer: str, topology: str) -> dict[str, list[int]]:
    """Train with a quantizer in every mode.

    Args:
        rank: This rank.
        world_size: Number of ranks.
        quantizer: Name of the quantizer.
        topology: Name of the topology.

    Returns:
        By mode: digests of all payloads that this rank encoded, of its residuals, and of the weights.
    """
    payloads = _watch_payloads()
    return {mode: _train(rank, quantizer, topology, mode, payloads) for mode in MODES}


def record() -> dict[str, Any]:
    """All digests, as ``data/bits.json`` holds them."""
    from bits import run_of  # by its importable name, also where this file is the program

    runs = {key(*run): run_ranks(run_of, run[1], run[0], run[2], timeout=120) for run in RUNS}
    return {**environment(), "runs": runs}


class _Payloads:
    """Digests of all chunks that the kernels have encoded, uplinks and downlinks.

    Two threads encode, each its own direction, in an order that differs between runs.
    """

    def __init__(self) -> None:
        self.digests = [0, 0]

    def add(self, direction: int, wire: Any, rows: Iterable[Tensor], first: int = 0) -> None:
        digest = self.digests[direction]
        for chunk, row in zip(wire.chunks[first:], rows, strict=False):
            digest = zlib.crc32(row[: chunk.used_bytes].numpy().tobytes(), digest)
        self.digests[direction] = digest


def _watch_payloads() -> _Payloads:
    payloads = _Payloads()
    encode_, reduce_encode_ = cpu.CpuKernels.encode_, cpu.CpuKernels.reduce_encode_

    def encode(
        self: Any, wire: Any, x: Any, residual: Any, payload: Tensor, *a: Any, **k: Any
    ) -> None:
        encode_(self, wire, x, residual, payload, *a, **k)
        payloads.add(0, wire, payload)

    def reduce(
        self: Any,
        up: Any,
        down: Any,
        server: int,
        received: Any,
        residual: Any,
        dtype: Any,
        out: Tensor,
        **k: Any,
    ) -> None:
        reduce_encode_(self, up, down, server, received, residual, dtype, out, **k)
        payloads.add(1, down, [out], server)

    cpu.CpuKernels.encode_, cpu.CpuKernels.reduce_encode_ = encode, reduce  # type: ignore[method-assign]
    return payloads


def _build(quantizer: str, topology: str, mode: str) -> tuple[Any, Any, Any]:
    model = ddp(ChosenGradients(SHAPES))
    options: dict[str, Any] = {}
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=2**-6)
    if mode == "preconditioned":
        optimizer = torch.optim.Adam(model.parameters(), lr=2**-10, fused=True)
        options = {"optimizer": optimizer, "precondition": True}
    if mode in ("update", "weights"):
        optimizer = EfficientAdam(model.parameters(), lr=2**-10, second_moment="local")
        options = {"optimizer": optimizer, "quantize_weights": mode == "weights"}
    return (
        model,
        optimizer,
        attach(model, quantizer=quantizer, topology=topology, block_size=256, **options),
    )


def _train(rank: int, quantizer: str, topology: str, mode: str, payloads: _Payloads) -> list[int]:
    payloads.digests = [0, 0]
    model, optimizer, state = _build(quantizer, topology, mode)
    for step in range(_STEPS):
        if step == _RESUMED:
            saved = state.state_dict(), model.state_dict(), optimizer.state_dict()
            state.close()
            model, optimizer, state = _build(quantizer, topology, mode)
            model.load_state_dict(saved[1])
            optimizer.load_state_dict(saved[2])
            state.load_state_dict(saved[0])
        optimizer.zero_grad()
        model(_gradients(rank, step)).backward()
        optimizer.step()
    saved_state = state.state_dict()
    residuals = [
        saved_state[side][name]
        for side in ("worker", "server")
        for name in sorted(saved_state[side])
    ]
    state.close()
    return [*payloads.digests, _digest(residuals), _digest(model.module.parameters())]


def _gradients(rank: int, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return [
        torch.randint(-(1 << 12), 1 << 12, shape, generator=generator).float()
        * 2.0 ** (-16 - index)
        for index, shape in enumerate(SHAPES)
    ]


def _digest(tensors: Iterable[Tensor]) -> int:
    digest = 0
    for tensor in tensors:
        digest = zlib.crc32(tensor.detach().contiguous().numpy().tobytes(), digest)
    return digest


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(json.dumps(record(), indent=1) + "\n")
    sys.stdout.write(f"{PATH}\n")
