"""Bytes on the links of a lab, counted by the kernel."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["WireBytes", "read_wire_bytes"]


@dataclass(frozen=True)
class WireBytes:
    """Bytes on every host's link, including the Ethernet, IP and TCP headers of every packet.

    Attributes:
        sent: Bytes from each host to the switch.
        received: Bytes from the switch to each host.
    """

    sent: tuple[int, ...]
    received: tuple[int, ...]

    def __sub__(self, earlier: WireBytes) -> WireBytes:
        """Compute the bytes since an earlier reading."""
        return WireBytes(
            tuple(a - b for a, b in zip(self.sent, earlier.sent, strict=True)),
            tuple(a - b for a, b in zip(self.received, earlier.received, strict=True)),
        )

    @property
    def busiest(self) -> int:
        """Return the maximum over links and directions."""
        return max(*self.sent, *self.received)

    @property
    def total(self) -> int:
        """Return the bytes that all hosts sent."""
        return sum(self.sent)


def read_wire_bytes(lab_id: str, hosts: int) -> WireBytes:
    """Read the counters of a lab's links; any process of root can do so.

    Args:
        lab_id: Identifier of the lab, :attr:`NetLab.id <netlab.lab.NetLab.id>`.
        hosts: Number of hosts.

    Returns:
        The bytes since the lab was built.
    """
    received = _counted(f"{lab_id}-sw", [f"p{host}" for host in range(hosts)])
    sent = [_counted(f"{lab_id}-h{host}", ["eth0"])[0] for host in range(hosts)]
    return WireBytes(tuple(sent), tuple(received))


def _counted(namespace: str, devices: Sequence[str]) -> list[int]:
    # The counter of the token bucket, not of the interface: it includes the headers that splitting a
    # large segment adds, and it is the value to which the rate applies.
    command = ["tc", "-n", namespace, "-s", "-j", "qdisc", "show"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counted = {q["dev"]: q["bytes"] for q in json.loads(text) if q["kind"] == "tbf"}
    return [int(counted[device]) for device in devices]
