"""Options of the hook: names, types and descriptions, for everything that accepts them."""

from __future__ import annotations

import re
from typing import TypedDict, TypeVar

__all__ = ["HookOptions", "StateOptions", "describe_options", "document_options"]

_PLACEHOLDER = re.compile(r"^(?P<indent> *)\{options\}$", re.M)
_T = TypeVar("_T")


class StateOptions(TypedDict, total=False):
    """Options of :class:`effadam_hook.EfficientAdamState`.

    Attributes:
        quantizer: Name of the quantizer of both directions, see
            :data:`effadam_hook.wire.quantizers.QUANTIZERS`. Default: ``"lloyd4"``.
        worker_quantizer: Quantizer of the uplink; None for ``quantizer``. Default: ``None``.
        server_quantizer: Quantizer of the downlink; None for ``quantizer``. Default: ``None``.
        block_size: Number of elements that share a scale, a power of two from 16 to 4096.
            Default: ``256``.
        topology: ``"rank0"`` (rank 0 is the server), ``"sharded"`` (every rank is the server for its
            share) or ``"auto"`` (the faster of the two, measured before the first exchange or taken
            from a loaded state). Results do not depend on it. Default: ``"rank0"``.
        error_feedback: Whether the quantization error of a step is added to the next step, on both
            sides. Default: ``True``.
        exact: Rules for parameters that are sent uncompressed: ``"1d"`` (at most one dimension),
            ``"<N"`` (fewer than N elements), or shell patterns for names, such as ``"*.norm*"``.
            Default: ``("1d",)``.
        warmup_steps: Number of backward passes with a dense all-reduce before compression starts.
            Default: ``0``.
        enabled: Whether to compress. The attribute ``enabled`` of the state changes it between steps;
            it must be equal on all ranks. Default: ``True``.
        scale_rule: Rule for the scale of a block, ``"least_squares"`` or ``"absmax"``.
            Default: ``"least_squares"``.
        wait_timeout_s: Seconds after which a bucket that waits for other ranks raises an error with
            their state; None for the time-out of the process group. Default: ``None``.
    """

    quantizer: str
    worker_quantizer: str | None
    server_quantizer: str | None
    block_size: int
    topology: str
    error_feedback: bool
    exact: tuple[str, ...] | list[str]
    warmup_steps: int
    enabled: bool
    scale_rule: str
    wait_timeout_s: float | None


class HookOptions(StateOptions, total=False):
    """Options of :func:`effadam_hook.attach` and of the Lightning strategies.

    They are those of :class:`StateOptions` and the following.

    Attributes:
        auto: Whether to measure first if compression makes steps faster: 8 dense and 8 compressed steps
            run, 5 of each are timed, and all ranks keep the faster kind. ``state.summary()`` and the
            log, at level INFO, report the result. If dense steps are faster, the residuals of the
            compressed steps, about one step's gradient, are not applied. Default: ``False``.
        precondition: Whether to quantize the gradient divided by the root of the second moment of the
            model's ``torch.optim.Adam`` or ``AdamW``. This improves quality about as much as one more
            bit, without further traffic. Default: ``False``.
        quantize_weights: Whether the servers keep the weights and send them quantized by
            ``server_quantizer`` instead of updates, as Quantized Adam does (arXiv 2004.14180).
            Requires an :class:`effadam_hook.EfficientAdam`. Default: ``False``.
    """

    auto: bool
    precondition: bool
    quantize_weights: bool


def describe_options(options: type = HookOptions) -> dict[str, str]:
    """Return the descriptions of options.

    Args:
        options: :class:`HookOptions` or :class:`StateOptions`.

    Returns:
        The descriptions from the docstrings, by name. Lines keep their indentation relative to the
        name. Empty if Python runs without docstrings.
    """
    kinds = (StateOptions, HookOptions) if options is HookOptions else (options,)
    entries: dict[str, str] = {}
    for kind in kinds:
        _, _, attributes = (kind.__doc__ or "").partition("Attributes:\n")
        for entry in re.split(r"\n(?= {8}\w)", attributes.rstrip()):
            name, colon, text = entry.strip().partition(": ")
            if colon:
                entries[name] = re.sub(r"\n {8}", "\n", text)
    return entries


def document_options(documented: _T) -> _T:
    """Replace the line ``{options}`` of a docstring by the descriptions of :class:`HookOptions`.

    Args:
        documented: Class or function with such a docstring.

    Returns:
        The same object.
    """
    text = documented.__doc__
    match = _PLACEHOLDER.search(text) if text else None
    if text and match:
        entries = [f"{name}: {entry}" for name, entry in describe_options().items()]
        lines = "\n".join(entries).splitlines()
        described = "\n".join(match["indent"] + line for line in lines)
        documented.__doc__ = text[: match.start()] + described + text[match.end() :]
    return documented
