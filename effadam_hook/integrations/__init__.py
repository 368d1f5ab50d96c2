"""Adapters for training libraries and loggers, each imported only by its own name."""
