"""Statistics of a state, and its summary as text."""

from __future__ import annotations

import math

import torch

from effadam_hook._version import __version__
from effadam_hook.ddp.engine import Engine
from effadam_hook.kernels import describe
from effadam_hook.session.card import describe_card
from effadam_hook.session.node_log import describe_inside
from effadam_hook.wire.counters import human_bytes

__all__ = ["describe_briefly", "stats_of", "summarize"]


def stats_of(engine: Engine) -> dict[str, float]:
    """Return counters, residual norms and the duration of the last exchange. Waits for the device.

    Args:
        engine: The engine.

    Returns:
        The values of :meth:`effadam_hook.state.EfficientAdamState.stats`.
    """
    session = engine.session
    session.settle()
    worker, server = session.worker.norm(), session.server.norm()
    scale = session.loss_scale.value
    result = _result_norm(engine)
    if result and session.topology.shares > 1:
        result /= math.sqrt(session.topology.shares)  # the residual covers one share
    return {
        **session.counters.to_dict(),
        "ratio": session.counters.ratio,
        "worker_residual_norm": worker / scale,
        "server_residual_norm": server / scale,
        "quantization_error": worker / result if result else 0.0,
        "exchange_s": engine.clock.seconds,
    }


def _result_norm(engine: Engine) -> float:
    """Return the 2-norm of the last compressed result, in units of the scaled loss; 0 without one."""
    results = [buffers.result() for buffers in engine.session.buckets]
    norms = [result.double().norm() for result in results if result is not None]
    return float(torch.stack(norms).norm()) if norms else 0.0


def summarize(engine: Engine, is_copy: bool) -> str:
    """Describe options, choices and traffic in lines of text. Waits for the device.

    Lines without a meaning are left out: those of the quantizers while no step is compressed, those of
    the traffic before the first step.

    Args:
        engine: The engine.
        is_copy: Whether the state is an unused copy of another one.
    """
    session = engine.session
    lines = [("", f"Efficient-Adam {__version__}: {_status(engine, is_copy)}")]
    has_residuals = len(session.worker) > 0
    if engine.enabled or has_residuals or engine.auto_compress is not None:
        lines += _options(engine)
    lines += [("bypassed", f"{name}: {why}") for name, why in session.bypassed.items()]
    if session.counters.steps:
        lines += _traffic(engine, has_residuals)
    return "\n".join(f"  {name:<12} {text}" if name else text for name, text in lines)


def describe_briefly(engine: Engine, is_copy: bool) -> str:
    """Describe a state in one line, without waiting for the device.

    Args:
        engine: The engine.
        is_copy: Whether the state is an unused copy of another one.
    """
    config, counters = engine.session.config, engine.session.counters
    return (
        f"<EfficientAdamState {_status(engine, is_copy)}: {engine.session.mode.name}, "
        f"{_quantizers(engine)}, {config.topology}; {counters.steps} steps, "
        f"{counters.ratio:.2f}x fewer bytes>"
    )


def _options(engine: Engine) -> list[tuple[str, str]]:
    session = engine.session
    config = session.config
    lines = [
        ("exchanges", session.mode.name),
        (
            "quantizers",
            f"{_quantizers(engine)}, {session.blocks.describe()}; scale {config.scale_rule}",
        ),
        ("feedback", "both sides" if config.error_feedback else "none"),
        ("topology", engine.describe_topology()),
    ]
    if inside := describe_inside(session):
        lines.append(("in a node", inside))
    if engine.auto_compress is not None:
        lines.append(("auto", engine.auto_compress.outcome))
    lines.append(("kernels", _kernels(engine)))
    slots = [slot for buffers in session.buckets for slot in buffers.layout.slots]
    if slots:
        exact = [slot for slot in slots if slot.exact]
        share = sum(slot.numel for slot in exact) / max(1, sum(slot.numel for slot in slots))
        text = f"{len(exact)} of {len(slots)} parameters, {share:.2%} of the elements"
        if small := session.parameters.quantized_1d(config):
            text += f'; without rule "1d", {len(small)} of one dimension are quantized'
        lines.append(("exact", text))
    return lines


def _traffic(engine: Engine, has_residuals: bool) -> list[tuple[str, str]]:
    stats = stats_of(engine)
    dense, up, down = (stats[f"{name}_bytes"] for name in ("dense", "uplink", "downlink"))
    lines = [("steps", f"{stats['steps']}")]
    if up + down < dense:
        lines.append(
            (
                "bytes",
                f"{human_bytes(dense)} -> {human_bytes(up + down)} a rank, up "
                f"{human_bytes(up)} and down {human_bytes(down)}: {stats['ratio']:.2f}x less",
            )
        )
    else:
        lines.append(("bytes", f"{human_bytes(dense)} a rank, uncompressed"))
    if card := describe_card(engine.session):
        lines.append(("card", card))
    if has_residuals:
        error = stats["quantization_error"]
        lines.append(
            (
                "residuals",
                f"norm {stats['worker_residual_norm']:.3g} (worker), "
                f"{stats['server_residual_norm']:.3g} (server)"
                + (f"; the worker's is {error:.2f} times the last result" if error else ""),
            )
        )
    if stats["exchange_s"]:
        lines.append(("exchange", f"{1000 * stats['exchange_s']:.1f} ms in the last step"))
    return lines


def _quantizers(engine: Engine) -> str:
    up, down = engine.session.config.worker_quantizer, engine.session.config.server_quantizer
    return up if up == down else f"{up} up, {down} down"


def _status(engine: Engine, is_copy: bool) -> str:
    warmup_steps = engine.session.config.warmup_steps
    if is_copy:
        return "a copy, registered with no model: no residuals, no optimizer"
    if not engine.enabled:
        return "off (dense all-reduce)"
    if engine.session.counters.steps < warmup_steps:
        return f"warming up (dense all-reduce until step {warmup_steps})"
    return "on"


def _kernels(engine: Engine) -> str:
    session = engine.session
    if session.connection.kernels is None:
        return "not chosen before the first backward"
    return describe(session.connection.kernels, session.parameters.device())
