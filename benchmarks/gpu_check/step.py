"""Properties of a training step: allocations, waits of the host, CUDA graphs, ``torch.compile``."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from effadam_hook import attach
from effadam_hook.kernels import choose
from gpu_check.kernels import layout_of, values
from gpu_check.outcome import Checks, Context, SkipError, require
from gpu_check.ranks import small_model

__all__ = ["run"]

WARM_UP, STEPS = 8, 10


def run(context: Context) -> Checks:
    """Check a group of one rank, over NCCL on a GPU and over Gloo otherwise."""
    checks = Checks()
    device = torch.device(context.device)
    with _group(device):
        checks.run("no step allocates more than a dense one", lambda: allocations(device))
        checks.run("no step waits for the device", lambda: synchronization(device))
        checks.run("encode and decode in a CUDA graph", lambda: kernels_in_a_graph(device))
        checks.run("forward and backward in a CUDA graph", lambda: step_in_a_graph(device))
        checks.run("torch.compile of the model", lambda: compiled(device))
        checks.run("time of a step with kernels and without", lambda: step_times(device))
    return checks


@contextmanager
def _group(device: torch.device) -> Iterator[None]:
    backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(str(Path(folder) / "store"), 1)
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


class Step:
    """A model with and without the hook, and a step of its training."""

    def __init__(self, device: torch.device, enabled: bool, model: nn.Module | None = None) -> None:
        module = (model or small_model()).to(device)
        self.model = DistributedDataParallel(module, gradient_as_bucket_view=True)
        self.state = attach(self.model, quantizer="lloyd4") if enabled else None
        width = next(module.parameters()).shape[1]
        self.x = torch.randn(32, width, device=device)

    def __call__(self) -> None:
        self.model(self.x).square().mean().backward()


def _needs_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise SkipError("needs a GPU")


def allocations(device: torch.device) -> str:
    """Count the allocations of a step once it is warm, those from torch's cache included."""
    _needs_gpu(device)
    counts = {}
    for enabled in (False, True):
        step = Step(device, enabled)
        for _ in range(WARM_UP):
            step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        peak = torch.cuda.memory_allocated()
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
        counts[enabled] = (torch.cuda.memory_stats()["allocation.all.allocated"] - before) / STEPS
        grown = torch.cuda.memory_allocated() - peak
        require(grown == 0, f"memory grows by {grown} bytes in {STEPS} steps")
    detail = f"{counts[True]:.1f} allocations a step, dense {counts[False]:.1f}"
    require(counts[True] <= counts[False], detail)
    return detail


def synchronization(device: torch.device) -> None:
    """Run steps with an error for each wait of the host for the device."""
    _needs_gpu(device)
    step = Step(device, enabled=True)
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(STEPS):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def kernels_in_a_graph(device: torch.device) -> None:
    """Capture an encoding and a decoding; their sum must be the input."""
    _needs_gpu(device)
    kernels = choose(device).kernels
    layout = layout_of((50_000, 300), "lloyd4", "least_squares", 256, 4)
    x = values(layout.numel, torch.float32).to(device)
    e, out = torch.zeros_like(x), torch.empty_like(x)
    payload = torch.zeros((1, layout.uplink.stride_bytes), dtype=torch.uint8, device=device)

    def step() -> None:
        kernels.encode_(layout.uplink, x, e, payload, torch.float32)
        kernels.decode(layout.uplink, payload, out, torch.float32)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    e.zero_()
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(out + e, x)


def step_in_a_graph(device: torch.device) -> None:
    """Capture a whole step; skipped where DDP itself cannot be captured here."""
    _needs_gpu(device)
    try:
        _captured(Step(device, enabled=False))
    except RuntimeError as error:
        raise SkipError(f"DDP's own all-reduce cannot be captured here: {error}") from error
    _captured(Step(device, enabled=True))


def _captured(step: Step) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(11):  # DDP asks for 11 steps before a capture
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    torch.cuda.synchronize()
    gradients = [p.grad for p in step.model.parameters() if p.grad is not None]
    require(all(bool(g.isfinite().all()) for g in gradients), "gradients are not finite")


def compiled(device: torch.device) -> str:
    """Compile a DDP model with the hook, and compare its gradients with those of the eager one."""
    grads: list[Tensor] = []
    for compile_it in (False, True):
        torch.manual_seed(1)
        step = Step(device, enabled=True)
        model = torch.compile(step.model) if compile_it else step.model
        for _ in range(3):
            step.model.zero_grad()
            model(step.x).square().mean().backward()
        grads.append(
            torch.cat([p.grad.flatten() for p in step.model.parameters() if p.grad is not None])
        )
    share = float((grads[0] - grads[1]).norm() / grads[0].norm())
    require(share < 0.1, f"gradients differ by {share:.1%}")
    return f"gradients differ by {share:.2%}"


def step_times(device: torch.device) -> str:
    """Time steps of a model of matrices with the hook and without, alternately."""
    width = 2048 if device.type == "cuda" else 64
    torch.manual_seed(0)
    steps = {
        enabled: Step(device, enabled, nn.Sequential(*(nn.Linear(width, width) for _ in range(8))))
        for enabled in (False, True)
    }
    times: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(30):
        for enabled, step in steps.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start_s = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= WARM_UP:
                times[enabled].append(time.perf_counter() - start_s)
    dense, ours = (1e3 * statistics.median(times[enabled]) for enabled in (False, True))
    return (
        f"{ours:.2f} ms with kernels, {dense:.2f} ms without ({ours / dense:.2f} times), one rank"
    )
