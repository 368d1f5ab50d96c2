"""Properties of a training step: allocations, waits of the host, precision, ``torch.compile``, time."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from effadam_hook import attach
from gpu_check.device import Device, device_of, require_triton
from gpu_check.outcome import Checks, Context, SkipError, require

__all__ = ["Step", "group_of_one", "run"]

# DDP waits for its own events in the first ten forwards, to log its times.
WARM_UP, STEPS = 12, 10
BUSY_S = 0.3
TURNS = 30


def run(context: Context) -> Checks:
    """Check a group of one rank, over NCCL where torch has it and over Gloo otherwise."""
    checks = Checks()
    device = device_of(context.device)
    with group_of_one(device):
        checks.run("no step takes memory from the device", lambda: allocations(device))
        checks.run("no step waits for the device", lambda: waits(device))
        checks.run("residuals of unused parameters keep", lambda: unused(device))
        for dtype in (torch.bfloat16, torch.float16):
            name = str(dtype).removeprefix("torch.")
            checks.run(f"autocast to {name}", lambda dtype=dtype: autocast(device, dtype))
        checks.run("time of a step with the kernels and without", lambda: step_times(device))
        checks.run("torch.compile of the model", lambda: compiled(device))
    return checks


@contextmanager
def group_of_one(device: Device) -> Iterator[None]:
    """Make a default process group of one rank."""
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(str(Path(folder) / "store"), 1)
        dist.init_process_group(device.backend, store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def perceptron(width: int = 256) -> nn.Module:
    """Return a small model, the same at each call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 8))


class Step:
    """A model with and without the hook, and the step of its training."""

    def __init__(self, device: Device, enabled: bool, module: nn.Module, **options: Any) -> None:
        self.model = DistributedDataParallel(
            module.to(device.device), gradient_as_bucket_view=True, **options
        )
        self.state = attach(self.model, quantizer="lloyd4") if enabled else None
        width = next(module.parameters()).shape[1]
        drawn = torch.Generator().manual_seed(1)
        self.x = torch.randn(32, width, generator=drawn).to(device.device)

    def __call__(self) -> None:
        """Run a step."""
        self.model.zero_grad(set_to_none=True)
        self.forward_and_backward()

    def loss(self, model: nn.Module) -> Tensor:
        """Return the loss of a model, DDP or not."""
        loss: Tensor = model(self.x).square().mean()
        return loss

    def forward_and_backward(self) -> None:
        """Run what a CUDA graph can contain."""
        self.loss(self.model).backward()


def warm(device: Device, enabled: bool) -> Step:
    """Return a step that has run often enough."""
    step = Step(device, enabled, perceptron())
    for _ in range(WARM_UP):
        step()
    device.synchronize()
    return step


def allocations(device: Device) -> str:
    """Count the allocations of warm steps, which take nothing from the device."""
    requests = {}
    for enabled in (False, True):
        step = warm(device, enabled)
        before = device.memory()
        for _ in range(STEPS):
            step()
        after = device.memory()
        requests[enabled] = (after.requests - before.requests) / STEPS
        grown = after.bytes_in_use - before.bytes_in_use
        require(grown == 0, f"memory grows by {grown} bytes in {STEPS} steps. Must not grow.")
        taken = after.segments - before.segments
        require(taken == 0, f"{taken} allocations from the device in {STEPS} steps. Must be 0.")
    # The search for unused parameters takes its temporaries from the allocator's cache.
    return f"{requests[True]:.1f} requests to torch's cache a step, dense {requests[False]:.1f}"


def waits(device: Device) -> str:
    """Run steps behind a kernel that spins: the host must be back before it ends.

    ``torch.cuda.set_sync_debug_mode`` names the operation that waits, but knows no waits for events,
    streams and collectives; the spinning kernel finds all of them.
    """
    require_triton(device)
    if device.is_gpu and device.backend != "nccl":
        raise SkipError("over Gloo the host waits for payloads; torch has no NCCL")
    slowest = {}
    for enabled in (False, True):
        step = warm(device, enabled)
        with device.without_waits():
            for _ in range(STEPS):
                step()
        device.synchronize()
        slowest[enabled] = 0.0
        for _ in range(STEPS // 2):
            is_busy = device.occupy(BUSY_S)
            start_s = time.perf_counter()
            step()
            taken_s = time.perf_counter() - start_s
            slowest[enabled] = max(slowest[enabled], taken_s)
            was_busy = is_busy()
            device.synchronize()
            late = f"returns after {taken_s:.2f} s, when the {BUSY_S:g} s of a kernel are over"
            if not was_busy and not enabled:
                raise SkipError(f"a step of DDP without the hook {late}")
            require(was_busy, f"a step {late}. Must return before.")
    return (
        f"the host is back after {1e3 * slowest[True]:.1f} ms, dense {1e3 * slowest[False]:.1f} ms, "
        f"on a device that is busy for {1e3 * BUSY_S:.0f} ms"
    )


class Branches(nn.Module):
    """Two layers, of which the caller chooses whether the second is used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 301), nn.Linear(64, 301)
        self.uses_second = True

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.first(x)
        return out + self.second(x) if self.uses_second else out


def unused(device: Device) -> str:
    """Leave a layer out of a step; its residual must not change, that of the other one must."""
    step = Step(device, True, Branches(), find_unused_parameters=True)
    assert step.state is not None
    for _ in range(2):
        step()
    before = step.state.state_dict()["worker"]
    step.model.module.uses_second = False
    step()
    after = step.state.state_dict()["worker"]
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    require(
        changed == ["first.weight"],
        f"the residuals of {changed} have changed. Must be those of ['first.weight'].",
    )
    return "the layer without gradients keeps its residual to the bit"


def autocast(device: Device, dtype: torch.dtype) -> str:
    """Train in mixed precision, with a scaler for float16; the loss must fall."""
    step = Step(device, True, perceptron())
    assert step.state is not None
    scaler = torch.amp.GradScaler(device.name, enabled=dtype == torch.float16)
    step.state.grad_scaler = scaler
    optimizer = torch.optim.Adam(step.model.parameters(), lr=1e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast(device.name, dtype):
            loss = step.loss(step.model)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    require(losses[-1] < losses[0] / 2, f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f}")
    steps = int(step.state.stats()["steps"])
    require(steps == len(losses), f"the hook has run in {steps} of {len(losses)} steps")
    return f"loss {losses[0]:.4f} to {losses[-1]:.4f}"


def compiled(device: Device) -> str:
    """Compile a DDP model with the hook, and compare its gradients with those of the eager one."""
    gradients: list[Tensor] = []
    for compile_it in (False, True):
        step = Step(device, True, perceptron())
        model: nn.Module = step.model
        if compile_it:  # the compiler for the CPU takes minutes on some machines
            model = torch.compile(model, backend="inductor" if device.is_gpu else "eager")
        for _ in range(3):
            step.model.zero_grad()
            step.loss(model).backward()
        assert step.state is not None
        steps = int(step.state.stats()["steps"])
        require(steps == 3, f"the hook has run in {steps} of 3 steps")
        found = [p.grad.flatten() for p in step.model.parameters() if p.grad is not None]
        gradients.append(torch.cat(found))
    share = float((gradients[0] - gradients[1]).norm() / gradients[0].norm())
    require(share < 0.02, f"gradients differ by {share:.1%}. Must be below 2%.")
    return f"gradients differ by {share:.2%}"


def step_times(device: Device) -> str:
    """Time steps of a model of matrices with the hook and without, alternately."""
    width = 2048 if device.is_gpu else 64
    torch.manual_seed(0)
    steps = {
        enabled: Step(device, enabled, nn.Sequential(*(nn.Linear(width, width) for _ in range(8))))
        for enabled in (False, True)
    }
    times: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(WARM_UP + TURNS):
        for enabled, step in steps.items():
            device.synchronize()
            start_s = time.perf_counter()
            step()
            device.synchronize()
            if turn >= WARM_UP:
                times[enabled].append(time.perf_counter() - start_s)
    dense, ours = (1e3 * statistics.median(times[enabled]) for enabled in (False, True))
    megabytes = 4 * 8 * (width * width + width) / 1e6
    return (
        f"{ours:.2f} ms with, {dense:.2f} ms without ({ours / dense:.2f} times); one rank with "
        f"{megabytes:.0f} MB of gradients, which sends nothing"
    )
