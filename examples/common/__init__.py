"""Shared code of the examples: options, local workers, training loop, checkpoints, reports."""
