"""Bytes on a host's network interface, as counted by the operating system."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from effadam_hook.exchange.probe import Probe

__all__ = ["InterfaceCounter"]

_DEVICES = Path("/proc/net/dev")
_RECEIVED, _SENT = 0, 8


class InterfaceCounter:
    """Byte counter of the interface that leads to the other ranks, for traffic of all programs.

    Attributes:
        name: The interface that ``GLOO_SOCKET_IFNAME`` or ``NCCL_SOCKET_IFNAME`` names, or that routes
            to ``MASTER_ADDR``; None if the system does not provide it.
    """

    def __init__(self) -> None:
        self.name = _named() or _routed(os.environ.get("MASTER_ADDR", "127.0.0.1"))

    def __call__(self, probe: Probe) -> tuple[list[int], list[int]]:
        """Return the counters of all ranks, read while no rank sends; zeros without counters."""
        probe.share(None)
        counters = probe.share(list(self._read()))
        return [sent for sent, _ in counters], [received for _, received in counters]

    @property
    def is_loopback(self) -> bool:
        """Return whether the bytes do not leave this machine."""
        return self.name is not None and self.name.startswith("lo")

    @property
    def description(self) -> str:
        """Return a description of the counted bytes."""
        if self.name is None:
            return "bytes are not counted: this system does not report which interface is used"
        if self.is_loopback:
            return (
                f"bytes are counted on the loopback interface {self.name!r}: for all ranks of this "
                "machine together, without a network"
            )
        return (
            f"bytes are counted on each host's interface {self.name!r}, including headers and traffic "
            "of other programs; all ranks of a host report the same counter"
        )

    def _read(self) -> tuple[int, int]:
        if self.name is None or not _DEVICES.exists():
            return 0, 0
        for line in _DEVICES.read_text().splitlines():
            name, colon, rest = line.partition(":")
            if colon and name.strip() == self.name:
                fields = rest.split()
                return int(fields[_SENT]), int(fields[_RECEIVED])
        return 0, 0


def _named() -> str | None:
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        name = os.environ.get(variable, "").split(",")[0]
        if name and not name.startswith("^"):
            return name.lstrip("=")
    return None


def _routed(address: str) -> str | None:
    """Return the interface whose address the system uses as the source."""
    try:
        family, _, _, _, there = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(there)
            here = str(probe.getsockname()[0])
    except OSError:
        return None
    if here.startswith("127.") or here == "::1":
        return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    return next((name for name in _interfaces() if _address_of(name) == here), None)


def _interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def _address_of(name: str) -> str | None:
    if os.name != "posix" or not _DEVICES.exists():
        return None
    import fcntl
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("256s", name.encode()[:15])
        try:
            answer = fcntl.ioctl(any_socket.fileno(), 0x8915, request)  # SIOCGIFADDR
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])
