"""The ``effadam`` command: what runs here, whether compression pays, and what a run did."""

from effadam_hook.cli.command import main

__all__ = ["main"]
