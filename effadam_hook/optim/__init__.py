"""The optimizer of update mode, its arithmetic, and the schedules of generic Adam."""

from effadam_hook.optim.efficient_adam import EfficientAdam

__all__ = ["EfficientAdam"]
