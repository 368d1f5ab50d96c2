"""Summary of a state as text."""

from __future__ import annotations

from effadam_hook._version import __version__
from effadam_hook.ddp.engine import Engine
from effadam_hook.kernels import describe
from effadam_hook.session.card import describe_card

__all__ = ["stats_of", "summarize"]


def stats_of(engine: Engine) -> dict[str, float]:
    """Return counters, residual norms and the duration of the last exchange. Waits for the device.

    Args:
        engine: The engine.

    Returns:
        The values of :meth:`effadam_hook.state.EfficientAdamState.stats`.
    """
    session = engine.session
    return {
        **session.counters.to_dict(),
        "ratio": session.counters.ratio,
        "worker_residual_norm": session.worker.norm(),
        "server_residual_norm": session.server.norm(),
        "exchange_s": engine.clock.seconds,
    }


def summarize(engine: Engine, is_copy: bool) -> str:
    """Describe options, choices and traffic in lines of text. Waits for the device.

    Args:
        engine: The engine.
        is_copy: Whether the state is an unused copy of another one.
    """
    session, stats = engine.session, stats_of(engine)
    config = session.config
    slots = [slot for buffers in session.buckets for slot in buffers.layout.slots]
    exact = [slot for slot in slots if slot.exact]
    lines = [
        f"Efficient-Adam {__version__}: {_status(engine, is_copy)}",
        f"  exchanges    {session.mode.name}",
        f"  quantizers   up {config.worker_quantizer}, down {config.server_quantizer}, "
        f"blocks of {config.block_size}, scale {config.scale_rule}",
        f"  feedback     {'both sides' if config.error_feedback else 'none'}",
        f"  topology     {session.connection.choice.describe()}",
    ]
    if engine.auto_compress is not None:
        lines.append(f"  auto         {engine.auto_compress.outcome}")
    lines += [
        f"  kernels      {_kernels(engine)}",
        f"  exact        {len(exact)} of {len(slots)} parameters, "
        f"{sum(s.numel for s in exact)} of {sum(s.numel for s in slots)} elements",
        *(f"  bypassed     {name}: {why}" for name, why in session.bypassed.items()),
        f"  steps        {stats['steps']}",
        f"  bytes        dense {stats['dense_bytes']}, up {stats['uplink_bytes']}, "
        f"down {stats['downlink_bytes']}: {stats['ratio']:.2f}x less",
        *(f"  card         {text}" for text in filter(None, [describe_card(session)])),
        f"  residuals    worker {stats['worker_residual_norm']:.4g}, "
        f"server {stats['server_residual_norm']:.4g}",
    ]
    return "\n".join(lines)


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
