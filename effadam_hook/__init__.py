"""Efficient-Adam for PyTorch DDP: two-way quantized communication with two-way error feedback."""

from effadam_hook._version import __version__
from effadam_hook.attach import attach
from effadam_hook.errors import DisagreementError, EffAdamError, StateMismatchError
from effadam_hook.hook import efficient_adam_hook
from effadam_hook.optim.efficient_adam import EfficientAdam
from effadam_hook.optim.momentum import reduced_betas
from effadam_hook.state import EfficientAdamState

__all__ = [
    "DisagreementError",
    "EffAdamError",
    "EfficientAdam",
    "EfficientAdamState",
    "StateMismatchError",
    "__version__",
    "attach",
    "efficient_adam_hook",
    "reduced_betas",
]
