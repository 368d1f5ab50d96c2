"""Callbacks at the end of a backward pass, before and after DDP writes gradients.

DDP waits for the buckets and writes gradients in a callback that it queues after the hook of the
last bucket. A callback queued by the hook of the first bucket runs before it. A callback queued by
that callback runs after it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["at_end_of_backward"]


def at_end_of_backward(action: Callable[[], None]) -> bool:
    """Queue a callback for the end of the running backward pass.

    Args:
        action: Called without arguments in the thread that runs the backward; ``backward()`` raises
            its errors.

    Returns:
        Whether the callback was queued. It is not if no backward runs, as in the hooks of a rank
        that ``join()`` keeps shadowing after its data has run out.
    """
    try:
        torch.autograd.Variable._execution_engine.queue_callback(action)
    except RuntimeError:
        return False
    return True
