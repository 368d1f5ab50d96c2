"""Modes of the exchange: gradients, preconditioned gradients, updates, or updates and weights.

The two-way exchange is the same in every mode. A mode selects the operation that the kernels fuse with
the quantizer, and the destination of the decoded result.
"""

from effadam_hook.modes.gradient import GradientMode
from effadam_hook.modes.mode import Content, Mode
from effadam_hook.modes.preconditioned import PreconditionedMode
from effadam_hook.modes.update import UpdateMode
from effadam_hook.modes.weights import WeightMode

__all__ = ["Content", "GradientMode", "Mode", "PreconditionedMode", "UpdateMode", "WeightMode"]
