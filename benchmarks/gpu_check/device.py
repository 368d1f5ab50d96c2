"""Calls of ``torch.cuda`` that the sections need, and what stands for them in a trial on the CPU.

Every other line of the sections runs in a trial, so that an error in it is found without a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from effadam_hook.kernels import choose
from gpu_check.outcome import SkipError

__all__ = ["Device", "Gpu", "Memory", "Trial", "device_of", "require_triton"]

Call = Callable[[], object]

SPIN_CYCLES = 20_000_000
LONGEST_SPIN_S = 1.0
SCRATCH_BYTES = 256 << 20  # larger than any L2 cache


@dataclass(frozen=True)
class Memory:
    """Counters of the caching allocator.

    Attributes:
        requests: Allocations that it has served.
        segments: Allocations that it has taken from the device.
        bytes_in_use: Size of all tensors.
    """

    requests: int
    segments: int
    bytes_in_use: int


class Trial:
    """The CPU, where work is finished when a call returns."""

    name = "cpu"
    is_gpu = False
    backend = "gloo"
    count = 1

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def synchronize(self) -> None:
        """Wait for the device."""

    def memory(self) -> Memory:
        """Return the counters of the allocator."""
        return Memory(0, 0, 0)

    @contextmanager
    def without_waits(self) -> Iterator[None]:
        """Make a wait of the host for the device an error within a context."""
        yield

    def occupy(self, seconds: float) -> Callable[[], bool]:
        """Keep the device busy for some seconds; the result says whether it still is."""
        return lambda: True

    @contextmanager
    def capture_stream(self) -> Iterator[None]:
        """Issue work to the stream that :meth:`capture` records, which is not the default one."""
        yield

    def capture(self, call: Call) -> Call:
        """Record a call in a graph without running it, and return the replay."""
        return call

    def seconds_of(self, calls: Mapping[str, Call], repeats: int) -> dict[str, list[float]]:
        """Measure the seconds of repeated calls on the device, without the time to launch them.

        Args:
            calls: Calls by name.
            repeats: Measurements of each.

        Raises:
            RuntimeError: If launching takes longer than :data:`LONGEST_SPIN_S`.
        """
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats):
            for name, call in calls.items():
                start_s = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start_s)
        return times


class Gpu(Trial):
    """The first CUDA or ROCm device."""

    name = "cuda"
    is_gpu = True

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)
        torch.cuda.set_device(self.device)
        nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
        self.backend = "nccl" if nccl else "gloo"
        self.count = torch.cuda.device_count()
        self._cycles_per_s = 0.0
        self._stream: torch.cuda.Stream | None = None

    def synchronize(self) -> None:
        """See :class:`Trial`."""
        torch.cuda.synchronize()

    def memory(self) -> Memory:
        """See :class:`Trial`; the device is idle when the counters are read."""
        torch.cuda.synchronize()
        stats = torch.cuda.memory_stats()
        if "segment.all.allocated" not in stats:
            raise SkipError("torch.cuda.memory_stats() counts nothing with this allocator")
        return Memory(
            int(stats["allocation.all.allocated"]),
            int(stats["segment.all.allocated"]),
            torch.cuda.memory_allocated(),
        )

    @contextmanager
    def without_waits(self) -> Iterator[None]:
        """See :class:`Trial`; synchronous copies and the like raise, waits for events do not."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def occupy(self, seconds: float) -> Callable[[], bool]:
        """See :class:`Trial`; a kernel spins on the current stream."""
        if not self._cycles_per_s:
            torch.cuda._sleep(1)  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
            start_s = time.perf_counter()
            torch.cuda._sleep(SPIN_CYCLES)  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
            self._cycles_per_s = SPIN_CYCLES / (time.perf_counter() - start_s)
        end = torch.cuda.Event()
        torch.cuda._sleep(int(seconds * self._cycles_per_s))  # type: ignore[no-untyped-call]
        end.record()
        return lambda: not end.query()

    @contextmanager
    def capture_stream(self) -> Iterator[None]:
        """See :class:`Trial`."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.synchronize()

    def capture(self, call: Call) -> Call:
        """See :class:`Trial`.

        Threads of NCCL query events during a capture, which only the mode "thread_local" allows.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            call()

        def replay() -> None:
            graph.replay()
            torch.cuda.synchronize()

        return replay

    def seconds_of(self, calls: Mapping[str, Call], repeats: int) -> dict[str, list[float]]:
        """See :class:`Trial`.

        A kernel spins until all calls are in the queue, so that launches cost nothing, and each call
        finds a cache without its tensors.
        """
        scratch = torch.empty(SCRATCH_BYTES, dtype=torch.uint8, device=self.device)
        for call in calls.values():
            call()
        spin_s = 0.01
        while spin_s <= LONGEST_SPIN_S:
            events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]]
            events = {name: [] for name in calls}
            torch.cuda.synchronize()
            is_busy = self.occupy(spin_s)
            for _ in range(repeats):
                for name, call in calls.items():
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    scratch.zero_()
                    start.record()
                    call()
                    end.record()
                    events[name].append((start, end))
            was_queued = is_busy()
            torch.cuda.synchronize()
            if was_queued:
                return {
                    name: [start.elapsed_time(end) / 1e3 for start, end in pairs]
                    for name, pairs in events.items()
                }
            spin_s *= 4
        raise RuntimeError(
            f"{repeats * len(calls)} calls were not launched within {LONGEST_SPIN_S:g} s: their times "
            "would be those of the launches. Run the check on an idle machine."
        )


def require_triton(device: Trial) -> None:
    """Skip a check on a GPU that runs the reference, which waits for the device.

    Raises:
        SkipError: If Triton is missing.
    """
    name = choose(device.device).kernels.name if device.is_gpu else ""
    if name == "reference":
        raise SkipError("the kernels are 'reference', see section machine")


Device = Trial
"""Either of them; :class:`Gpu` overrides every call."""


def device_of(name: str) -> Device:
    """Return the device of a section.

    Args:
        name: ``cuda`` or ``cpu``.
    """
    return Gpu() if name == "cuda" else Trial()
