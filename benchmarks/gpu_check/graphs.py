"""CUDA graphs: the kernels, and forward and backward with the exchange in them.

A section of its own: a capture that fails can leave streams and communicators unusable.
"""

from __future__ import annotations

import os

import torch

from effadam_hook.kernels import choose
from gpu_check.device import Device, device_of, require_triton
from gpu_check.kernels import layout_of, values
from gpu_check.outcome import Checks, Context, SkipError, require
from gpu_check.ranks import held_back
from gpu_check.step import Step, group_of_one

__all__ = ["run"]

# DDP rebuilds its buckets and measures itself in the first ten.
WARM_UP, REPLAYS = 12, 5


def run(context: Context) -> Checks:
    """Capture the kernels, then a step without and with the hook."""
    checks = Checks()
    # As PyTorch's notes on CUDA graphs ask: the thread that it stops would query events in a capture.
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    device = device_of(context.device)
    checks.run("encode and decode in a CUDA graph", lambda: kernels_in_a_graph(device))
    if device.is_gpu and device.backend != "nccl":
        reason = "Gloo sends from the host, so that a graph cannot contain it; torch has no NCCL"
        checks.add("forward and backward in a CUDA graph", "skipped", reason)
        return checks
    with group_of_one(device):
        checks.run("forward and backward in a CUDA graph", lambda: step_in_a_graph(device))
    return checks


def kernels_in_a_graph(device: Device) -> None:
    """Capture an encoding and a decoding; what is decoded and the residual must add up to the input."""
    require_triton(device)
    kernels = choose(device.device).kernels
    layout = layout_of((50_000, 300), "lloyd4", "least_squares", 256, 4)
    x = values(layout.numel, torch.float32).to(device.device)
    e, out = torch.zeros_like(x), torch.empty_like(x)
    payload = torch.zeros((1, layout.uplink.stride_bytes), dtype=torch.uint8, device=device.device)

    def step() -> None:
        kernels.encode_(layout.uplink, x, e, payload, torch.float32)
        kernels.decode(layout.uplink, payload, out, torch.float32)

    with device.capture_stream():
        step()
    replay = device.capture(step)
    x.mul_(-0.5)
    e.zero_()
    payload.zero_()
    out.fill_(float("nan"))
    replay()
    torch.testing.assert_close(out + e, x)


def step_in_a_graph(device: Device) -> str:
    """Capture a whole step; skipped where DDP itself cannot be captured here."""
    require_triton(device)
    try:
        replayed(device, enabled=False)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise SkipError(f"DDP's own all-reduce cannot be captured here: {reason}") from error
    return replayed(device, enabled=True)


def replayed(device: Device, enabled: bool) -> str:
    """Replay a step; its results and residuals must add up to the gradients, as without a graph."""
    with device.capture_stream():
        # A torch.nn.Linear: its gradient is known, and two of its parameters share a bucket.
        step = Step(device, enabled, torch.nn.Linear(300, 70))
        for _ in range(WARM_UP):
            step()
        step.model.zero_grad(set_to_none=True)
    replay = device.capture(step.forward_and_backward)
    before = held_back([step.state.state_dict()]) if step.state is not None else {}
    arrived = {name: torch.zeros_like(p) for name, p in step.model.module.named_parameters()}
    for _ in range(REPLAYS):
        if not device.is_gpu:
            step.model.zero_grad(set_to_none=True)
        replay()
        for name, parameter in step.model.module.named_parameters():
            require(parameter.grad is not None, f"{name} has no gradient")
            arrived[name] += parameter.grad
    after = held_back([step.state.state_dict()]) if step.state is not None else {}
    worst = 0.0
    for name, parameter in step.model.module.named_parameters():
        (gradient,) = torch.autograd.grad(step.loss(step.model.module), parameter)
        total = arrived[name].flatten().cpu().double()
        if name in after:
            total += after[name] - before[name]
        expected = REPLAYS * gradient.flatten().cpu().double()
        worst = max(worst, float((total - expected).abs().max() / expected.abs().max()))
    require(worst < 1e-3, f"results and residuals differ from the gradients by {worst:.1e}")
    return f"{REPLAYS} replays add up to the gradients, to {worst:.0e}"
