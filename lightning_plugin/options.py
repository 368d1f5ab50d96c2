"""Checks of the strategies' options, and of the optimizers that the options require.

A strategy is constructed long before the process group exists, and most options take effect when
training starts. Errors that do not depend on the process group are raised at construction.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from effadam_hook import EffAdamError, EfficientAdam, EfficientAdamState
from effadam_hook.config.options import HookOptions, state_options, unknown_option
from effadam_hook.ddp.auto_compress import check_auto
from effadam_hook.exchange.node_options import IntraNodeGroup, NodeMesh
from effadam_hook.optim.wrappers import unwrapped

__all__ = [
    "NodeOptions",
    "check_ddp_options",
    "check_hook_options",
    "exchanged_optimizer",
    "needs_optimizer",
]

_REFUSED = {
    "ddp_comm_hook": "the strategy registers its own communication hook, and DDP accepts only one",
    "ddp_comm_state": "the strategy creates the state of its communication hook",
    "ddp_comm_wrapper": "a wrapped hook would exchange other values than those in the residuals",
    "model_averaging_period": "post-local SGD does not exchange gradients in every step",
}
_NEED_OPTIMIZER = ("precondition", "quantize_weights")


class NodeOptions(TypedDict):
    """Options that name the nodes, which are no plain values; see :class:`EfficientAdamState`."""

    intra_node_group: IntraNodeGroup | None
    device_mesh: NodeMesh | None


def check_hook_options(options: HookOptions, nodes: NodeOptions) -> None:
    """Check the options of the exchange as far as possible without a process group.

    Args:
        options: All options.
        nodes: The options that name the nodes.

    Raises:
        ValueError: If the value of an option is invalid.
        TypeError: If an option has the wrong type.
    """
    EfficientAdamState(**nodes, **state_options(options))
    if options["auto"]:
        check_auto(options["enabled"], options["quantize_weights"])
    if options["precondition"] and options["quantize_weights"]:
        raise ValueError(
            f"Invalid {' and '.join(_NEED_OPTIMIZER)}: True. At most one of them may be set."
        )


def check_ddp_options(options: Mapping[str, Any], strategy: type) -> None:
    """Check that Lightning's DDPStrategy or DDP accepts every other option.

    Args:
        options: The options that are passed to them.
        strategy: Lightning's class.

    Raises:
        ValueError: If an option cannot be combined with compression.
        TypeError: If an option is unknown.
    """
    for name, reason in _REFUSED.items():
        if options.get(name) is not None:
            raise ValueError(f"Invalid {name}: {options[name]!r}. Must be left out: {reason}.")
    known = _names(strategy) | _names(DistributedDataParallel) - {"module", "device_ids"}
    for name in options:
        if name not in known:
            raise unknown_option(
                name,
                known | HookOptions.__annotations__.keys(),
                "Must be one of the strategy's own, of Lightning's DDPStrategy, or of torch's "
                "DistributedDataParallel.",
            )


def needs_optimizer(options: HookOptions) -> bool:
    """Return whether the options require the model's optimizer."""
    return options["precondition"] or options["quantize_weights"]


def exchanged_optimizer(optimizers: Sequence[Optimizer], options: HookOptions) -> Optimizer | None:
    """Select the optimizer that the exchange requires.

    Args:
        optimizers: All optimizers of the model.
        options: All options of the exchange.

    Returns:
        The optimizer; None in gradient mode, which works with any optimizers.

    Raises:
        EffAdamError: If the exchange requires an optimizer, and the model has none or several.
    """
    optimizers = [unwrapped(one, (EfficientAdam,)) for one in optimizers]
    special = any(isinstance(one, EfficientAdam) for one in optimizers)
    if not special and not needs_optimizer(options):
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
