"""DistributedDataParallel as a caller of the exchange: its backward passes and their checks."""
