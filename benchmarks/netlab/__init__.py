"""Simulated hosts with slow links between them, on one Linux machine."""

from .counters import WireBytes, read_wire_bytes
from .lab import LabError, NetLab, cleanup, leftovers
from .link import Link
from .ranks import RankError, run_in_lab

__all__ = [
    "LabError",
    "Link",
    "NetLab",
    "RankError",
    "WireBytes",
    "cleanup",
    "leftovers",
    "read_wire_bytes",
    "run_in_lab",
]
