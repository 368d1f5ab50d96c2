"""Options of the hook: names, types, defaults and descriptions, for everything that accepts them.

A function or class accepts the options as ``**options: Unpack[HookOptions]``. :func:`accepts_options`
writes them into its signature and docstring, where ``help()``, editors and LightningCLI read them, and
:func:`complete_options` refuses unknown names and adds the defaults. A further option is one attribute,
one description and one default in this file.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from typing import Any, Literal, TypedDict, TypeVar, cast, get_type_hints

__all__ = [
    "DEFAULTS",
    "HookOptions",
    "QuantizerName",
    "ScaleRuleName",
    "StateOptions",
    "TopologyName",
    "accepts_options",
    "complete_options",
    "describe_options",
    "state_options",
    "unknown_option",
]

QuantizerName = Literal[
    "uniform8",
    "uniform4",
    "uniform3",
    "log4",
    "log3",
    "lloyd4",
    "lloyd3",
    "lloyd2",
    "ternary",
    "sign",
    "none",
]
"""Keys of :data:`effadam_hook.wire.quantizers.QUANTIZERS`."""

TopologyName = Literal["rank0", "sharded", "hierarchical", "auto"]
"""Values of :data:`effadam_hook.config.TOPOLOGY_NAMES`."""

ScaleRuleName = Literal["least_squares", "absmax"]
"""Values of :data:`effadam_hook.wire.quantizers.SCALE_RULES`."""

_PLACEHOLDER = re.compile(r"^(?P<indent> *)\*\*options: .*$", re.M)
_T = TypeVar("_T")


class StateOptions(TypedDict, total=False):
    """Options of :class:`effadam_hook.EfficientAdamState`.

    Attributes:
        quantizer: Name of the quantizer of both directions, see
            :data:`effadam_hook.wire.quantizers.QUANTIZERS`. Default: ``"lloyd4"``.
        worker_quantizer: Quantizer of the uplink; None for ``quantizer``. Default: ``None``.
        server_quantizer: Quantizer of the downlink; None for ``quantizer``. Default: ``None``.
        block_size: Number of elements that share a scale, a multiple of 8 from 16 to 4096. None chooses
            at most 256 such that few blocks span two rows of the model's matrices; a loaded state of as
            many ranks keeps its blocks. Default: ``None``.
        topology: ``"rank0"`` (rank 0 is the server), ``"sharded"`` (every rank is the server for its
            share; the results are those of ``"rank0"``), ``"hierarchical"`` (gradients are averaged
            densely inside each node, and the means of the nodes exchanged) or ``"auto"``:
            ``"hierarchical"`` on several nodes with equally many ranks, two or more, else
            ``"sharded"``; a loaded state of as many ranks keeps its topology. Default: ``"auto"``.
        error_feedback: Whether the quantization error of a step is added to the next step, on both
            sides. Default: ``True``.
        exact: Rules for parameters that are sent uncompressed: ``"1d"`` (at most one dimension),
            ``"<N"`` (fewer than N elements), or shell patterns for names, such as ``"*.norm*"``.
            A value replaces the default: write ``("1d", "head.*")`` to add a pattern. A value that
            leaves biases and norms to the quantizer warns, except ``()``. Default: ``("1d",)``.
        warmup_steps: Number of backward passes with a dense all-reduce before compression starts.
            Default: ``0``.
        enabled: Whether to compress. The attribute ``enabled`` of the state changes it between steps;
            it must be equal on all ranks. Default: ``True``.
        scale_rule: Rule for the scale of a block, ``"least_squares"`` or ``"absmax"``.
            Default: ``"least_squares"``.
        wait_timeout_s: Seconds after which a bucket that waits for other ranks raises an error with
            their state; None for the time-out of the process group. Default: ``None``.
    """

    quantizer: QuantizerName
    worker_quantizer: QuantizerName | None
    server_quantizer: QuantizerName | None
    block_size: int | None
    topology: TopologyName
    error_feedback: bool
    exact: tuple[str, ...] | list[str]
    warmup_steps: int
    enabled: bool
    scale_rule: ScaleRuleName
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


DEFAULTS: HookOptions = {
    "quantizer": "lloyd4",
    "worker_quantizer": None,
    "server_quantizer": None,
    "block_size": None,
    "topology": "auto",
    "error_feedback": True,
    "exact": ("1d",),
    "warmup_steps": 0,
    "enabled": True,
    "scale_rule": "least_squares",
    "wait_timeout_s": None,
    "auto": False,
    "precondition": False,
    "quantize_weights": False,
}
"""Default of every option."""


def complete_options(given: Mapping[str, Any], kind: type[_T], beside: Collection[str] = ()) -> _T:
    """Add the defaults to options.

    Args:
        given: Options by name.
        kind: :class:`HookOptions` or :class:`StateOptions`.
        beside: Names of further parameters of the caller, for the suggestion.

    Returns:
        All options of this kind.

    Raises:
        TypeError: If an option is unknown, or one that is True or False is something else.
    """
    names = _hints(kind)
    values: Mapping[str, Any] = DEFAULTS
    for name, value in given.items():
        if name not in names:
            raise unknown_option(name, [*names, *beside])
        if isinstance(values[name], bool) and not isinstance(value, bool):
            raise TypeError(f"Invalid {name}: {value!r}. Must be True or False.")
    return cast(_T, {**{name: values[name] for name in names}, **given})


def state_options(options: HookOptions) -> StateOptions:
    """Return the options of the state among those of the hook."""
    names = _hints(StateOptions)
    return cast(StateOptions, {name: value for name, value in options.items() if name in names})


def unknown_option(name: str, known: Collection[str], rule: str = "") -> TypeError:
    """Return the error for an unknown option.

    Args:
        name: Name that was given.
        known: Names that exist.
        rule: Sentence for the message if no known name is similar; the list of the names by default.
    """
    close = get_close_matches(name, sorted(known), n=1)
    if close:
        return TypeError(f"Unknown option {name!r}. Did you mean {close[0]!r}?")
    rule = rule or f"Must be one of {', '.join(known)}."
    return TypeError(f"Unknown option {name!r}. {rule}")


def describe_options(kind: type = HookOptions) -> dict[str, str]:
    """Return the descriptions of options.

    Args:
        kind: :class:`HookOptions` or :class:`StateOptions`.

    Returns:
        The descriptions from the docstrings, by name. Lines keep their indentation relative to the
        name. Empty if Python runs without docstrings.
    """
    kinds = (StateOptions, HookOptions) if kind is HookOptions else (kind,)
    entries: dict[str, str] = {}
    for one in kinds:
        _, _, attributes = (one.__doc__ or "").partition("Attributes:\n")
        for entry in re.split(r"\n(?= {8}\w)", attributes.rstrip()):
            name, colon, text = entry.strip().partition(": ")
            if colon:
                entries[name] = re.sub(r"\n {8}", "\n", text)
    return entries


def accepts_options(kind: type) -> Callable[[_T], _T]:
    """Write options into the signature and the docstring of a function or class.

    In the signature the options are keywords with types and defaults; they replace ``**options``, and
    precede other keyword arguments such as ``**ddp_options``. In the docstring their descriptions
    replace the line that begins with ``**options:``.

    Args:
        kind: :class:`HookOptions` or :class:`StateOptions`.

    Returns:
        A decorator, which returns the function or class itself.
    """

    def decorate(accepting: _T) -> _T:
        target: Any = accepting
        function = vars(target)["__init__"] if isinstance(target, type) else target
        _extend_signature(function, kind)
        target.__doc__ = _with_descriptions(target.__doc__, kind)
        return accepting

    return decorate


def _extend_signature(function: Any, kind: type) -> None:
    hints, values = _hints(kind), cast(Mapping[str, Any], DEFAULTS)
    signature = inspect.signature(function)
    own = [one for name, one in signature.parameters.items() if name != "options"]
    last = [one for one in own if one.kind is one.VAR_KEYWORD]
    listed = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=values[name], annotation=hint
        )
        for name, hint in hints.items()
    ]
    first = [one for one in own if one not in last]
    function.__signature__ = signature.replace(parameters=[*first, *listed, *last])
    annotations = {
        name: hint for name, hint in function.__annotations__.items() if name != "options"
    }
    function.__annotations__ = {**annotations, **hints}


def _with_descriptions(text: str | None, kind: type) -> str | None:
    match = _PLACEHOLDER.search(text) if text else None
    if not text or not match:
        return text
    entries = [f"{name}: {entry}" for name, entry in describe_options(kind).items()]
    lines = "\n".join(entries).splitlines()
    described = "\n".join(match["indent"] + line for line in lines)
    return text[: match.start()] + described + text[match.end() :]


def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
