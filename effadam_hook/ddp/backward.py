"""Callbacks at the end of a backward pass, before and after DDP writes gradients.

DDP waits for the buckets and writes gradients in a callback that it queues after the hook of the last
bucket. A callback that the hook of the first bucket queues runs before that one, and one that is queued
while it runs, after it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["at_end_of_backward"]


def at_end_of_backward(action: Callable[[], None]) -> bool:
    """Queue a callback for the end of the running backward pass.

    Args:
        action: Called without arguments in the thread that runs backward; what it raises, ``backward()``
            raises.

    Returns:
        False where no backward runs, as in the hooks of a rank that ``join()`` keeps shadowing after its
        data has run out; nothing is queued then.
    """
    try:
        torch.autograd.Variable._execution_engine.queue_callback(action)
    except RuntimeError:
        return False
    return True
