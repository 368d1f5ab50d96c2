"""What the examples share: options, local workers, training loop, checkpoints, reports."""
