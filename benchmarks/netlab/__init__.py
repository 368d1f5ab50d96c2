"""Several "hosts" with slow links between them, on one Linux machine."""

from .counters import WireBytes, read_wire_bytes
from .lab import LabError, NetLab, cleanup, leftovers
from .link import Link
from .ranks import RankFailure, run_in_lab

__all__ = [
    "LabError",
    "Link",
    "NetLab",
    "RankFailure",
    "WireBytes",
    "cleanup",
    "leftovers",
    "read_wire_bytes",
    "run_in_lab",
]
