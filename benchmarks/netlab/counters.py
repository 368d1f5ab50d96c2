"""Bytes as the links see them, counted by the kernel and not by any program that sends them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["WireBytes", "read_wire_bytes"]


@dataclass(frozen=True)
class WireBytes:
    """What has passed every host's link, Ethernet, IP and TCP headers of every packet included.

    Attributes:
        sent: Bytes up, by host.
        received: Bytes down, by host.
    """

    sent: tuple[int, ...]
    received: tuple[int, ...]

    def __sub__(self, earlier: WireBytes) -> WireBytes:
        """What has passed since an earlier reading."""
        return WireBytes(
            tuple(a - b for a, b in zip(self.sent, earlier.sent, strict=True)),
            tuple(a - b for a, b in zip(self.received, earlier.received, strict=True)),
        )

    @property
    def busiest(self) -> int:
        """The most bytes that any link carried in one direction."""
        return max(*self.sent, *self.received)

    @property
    def total(self) -> int:
        """All bytes that were sent."""
        return sum(self.sent)


def read_wire_bytes(lab_id: str, hosts: int) -> WireBytes:
    """The counters of a lab's links, which any process of root's can read.

    Args:
        lab_id: :attr:`NetLab.id <netlab.lab.NetLab.id>`.
        hosts: Number of hosts.

    Returns:
        The counters since the links were shaped.
    """
    received = _passed(f"{lab_id}-sw", [f"p{host}" for host in range(hosts)])
    sent = [_passed(f"{lab_id}-h{host}", ["eth0"])[0] for host in range(hosts)]
    return WireBytes(tuple(sent), tuple(received))


def _passed(namespace: str, devices: Sequence[str]) -> list[int]:
    # The bucket's own counter: unlike the interface's it knows the headers that cutting a large
    # segment adds, and it is what the rate is held against.
    command = ["tc", "-n", namespace, "-s", "-j", "qdisc", "show"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    passed = {q["dev"]: q["bytes"] for q in json.loads(text) if q["kind"] == "tbf"}
    return [int(passed[device]) for device in devices]
