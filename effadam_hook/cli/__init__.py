"""The ``effadam`` command: environment, prediction and comparison of methods, logs of runs."""

from effadam_hook.cli.command import main

__all__ = ["main"]
