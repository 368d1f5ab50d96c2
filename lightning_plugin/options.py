"""The options of our strategies: which are the hook's, which are DDP's, and what is wrong.

A strategy is built long before there is a process group, and its options would otherwise be looked
at only when training starts. Everything that can be checked early is checked here.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from effadam_hook import EffAdamError, EfficientAdam, EfficientAdamState
from effadam_hook.ddp.auto_compress import check_auto
from effadam_hook.optim.wrappers import unwrapped

__all__ = ["check_ddp_options", "check_hook_options", "exchanged_optimizer"]

_TAKEN = {
    "ddp_comm_hook": "the strategy registers its own communication hook, and DDP takes only one",
    "ddp_comm_state": "the strategy makes the state of its communication hook itself",
    "ddp_comm_wrapper": "a wrapped hook would exchange other values than those it feeds back",
    "model_averaging_period": "post-local SGD does not exchange gradients in every step",
}


def check_hook_options(options: Mapping[str, Any], mode_options: Mapping[str, Any]) -> None:
    """Check the options of the exchange as far as that is possible without a process group.

    Args:
        options: Those of :class:`effadam_hook.EfficientAdamState`, and ``auto`` of
            :func:`effadam_hook.attach`.
        mode_options: ``precondition`` and ``quantize_weights`` of :func:`effadam_hook.attach`.

    Raises:
        ValueError: If an option has no such value.
        TypeError: If an option has the wrong type.
    """
    EfficientAdamState(**{name: value for name, value in options.items() if name != "auto"})
    if options["auto"]:
        check_auto(options["enabled"], mode_options["quantize_weights"])
    for name, value in {"auto": options["auto"], **mode_options}.items():
        if not isinstance(value, bool):
            raise TypeError(f"Invalid {name}: {value!r}. Must be True or False.")
    if all(mode_options.values()):
        raise ValueError(f"Invalid {' and '.join(mode_options)}: True. At most one may be set.")


def check_ddp_options(options: Mapping[str, Any], strategy: type, hook_options: set[str]) -> None:
    """Check that every other option is one of Lightning's DDPStrategy or of DDP itself.

    Args:
        options: What is to be passed on.
        strategy: Lightning's class.
        hook_options: The names of our own options, for the message.

    Raises:
        ValueError: If an option cannot be combined with compression.
        TypeError: If nobody knows an option.
    """
    for name, reason in _TAKEN.items():
        if options.get(name) is not None:
            raise ValueError(f"Invalid {name}: {options[name]!r}. Must be left out: {reason}.")
    known = _names(strategy) | _names(DistributedDataParallel) - {"module", "device_ids"}
    for name in options:
        if name not in known:
            close = get_close_matches(name, sorted(known | hook_options), n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise TypeError(
                f"Unknown option {name!r}. Must be one of the strategy's own, of Lightning's "
                f"DDPStrategy, or of torch's DistributedDataParallel.{hint}"
            )


def exchanged_optimizer(
    optimizers: Sequence[Optimizer], mode_options: Mapping[str, bool]
) -> Optimizer | None:
    """The optimizer that the exchange must know; None in gradient mode, where any will do.

    Args:
        optimizers: All that train the model.
        mode_options: As for :func:`check_hook_options`.

    Returns:
        One of them, or None.

    Raises:
        EffAdamError: If the exchange must know one, and there is not exactly one.
    """
    optimizers = [unwrapped(one, (EfficientAdam,)) for one in optimizers]
    special = any(isinstance(one, EfficientAdam) for one in optimizers)
    if not special and not any(mode_options.values()):
        return None
    if len(optimizers) != 1:
        raise EffAdamError(
            f"The model has {len(optimizers)} optimizers. Update mode, precondition=True and "
            "quantize_weights=True need exactly one, over all trainable parameters; its groups may "
            "have learning rates of their own. In gradient mode any number of optimizers works."
        )
    return optimizers[0]


def _names(kind: type) -> set[str]:
    parameters = inspect.signature(kind).parameters.values()
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
