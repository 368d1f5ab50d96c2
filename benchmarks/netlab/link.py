"""Link between a host and the switch, and the ``tc`` commands that shape it."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Link"]

_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_MIN_RATE, _MAX_RATE = 1e6, 1e11
_MAX_DELAY_MS = 1000.0
_SEGMENT_BYTES = 65536
_MTU_BYTES = 1500
# Switches in data centres buffer some milliseconds, so that N senders to one port lose few packets.
_QUEUE_S = 0.05
_MIN_QUEUE_BYTES = 1 << 20


@dataclass(frozen=True)
class Link:
    """A full-duplex link between a host and the switch.

    Attributes:
        rate: Bits per second in each direction, including Ethernet headers.
        delay_ms: One-way delay between any two hosts. Each of the two links adds half of it.
        keeps_windows: Whether TCP keeps its congestion window over pauses instead of starting slowly
            again: ``net.ipv4.tcp_slow_start_after_idle`` is 0.
    """

    rate: float
    delay_ms: float = 0.0
    keeps_windows: bool = False

    def __post_init__(self) -> None:
        if not _MIN_RATE <= self.rate <= _MAX_RATE:
            raise ValueError(
                f"Invalid rate: {self.rate:g} bit/s. Must be from {_MIN_RATE:g} to {_MAX_RATE:g}."
            )
        if not 0 <= self.delay_ms <= _MAX_DELAY_MS:
            raise ValueError(
                f"Invalid delay_ms: {self.delay_ms}. Must be from 0 to {_MAX_DELAY_MS:g}."
            )

    @classmethod
    def parse(cls, rate: str, delay_ms: float = 0.0, keeps_windows: bool = False) -> Link:
        """Parse a rate.

        Args:
            rate: Number and unit, for example ``"200mbit"`` or ``"2.5gbit"``.
            delay_ms: One-way delay between two hosts.
            keeps_windows: See :class:`Link`.

        Returns:
            The link.

        Raises:
            ValueError: If the rate cannot be parsed.
        """
        match = re.fullmatch(r"([0-9.]+) ?([kmg]bit)(/s)?", rate.strip().lower())
        if match is None:
            raise ValueError(
                f"Invalid rate: {rate!r}. Must be a number and kbit, mbit or gbit, for example 200mbit."
            )
        return cls(float(match[1]) * _UNITS[match[2]], delay_ms, keeps_windows)

    @property
    def name(self) -> str:
        """Return the rate and the other properties as text, for example ``200mbit+20ms``."""
        unit, size = ("gbit", 1e9) if self.rate >= 1e9 else ("mbit", 1e6)
        delay = f"+{self.delay_ms:g}ms" if self.delay_ms else ""
        windows = "+windows" if self.keeps_windows else ""
        return f"{self.rate / size:g}{unit}{delay}{windows}"

    def seconds(self, wire_bytes: float) -> float:
        """Compute the time that bytes occupy the link.

        Args:
            wire_bytes: Bytes including headers.

        Returns:
            Seconds.
        """
        return wire_bytes * 8 / self.rate

    @property
    def queue_bytes(self) -> int:
        """Return the capacity of the queue in front of the link, in bytes."""
        in_flight = self.rate / 8 * 2 * self.delay_ms / 1000
        return int(max(_MIN_QUEUE_BYTES, self.rate / 8 * _QUEUE_S + in_flight))

    @property
    def window_bytes(self) -> int:
        """Return TCP's maximum window: twice the bytes that fill the link, at least 4 MiB."""
        in_flight = self.rate / 8 * 2 * self.delay_ms / 1000
        return int(max(1 << 22, 2 * in_flight + self.queue_bytes))

    def shaping(self, device: str, delays: bool = True) -> list[list[str]]:
        """Make the ``tc`` commands that shape the traffic that leaves a device.

        The token bucket holds slightly more than one segment of 64 KiB. Such segments pass without
        being split, as in hosts whose network card splits them, and ``tbf`` accounts for the headers
        that splitting adds. The burst corresponds to 0.6 ms at 1 Gbit/s.

        Args:
            device: Name of the interface.
            delays: Whether netem adds :attr:`delay_ms`.

        Returns:
            Arguments of ``tc``, one list per command.
        """
        burst = int(max(1.25 * _SEGMENT_BYTES, self.rate / 8 * 1e-4))
        bucket = ["tbf", "rate", f"{self.rate:.0f}bit", "burst", str(burst)]
        bucket += ["limit", str(self.queue_bytes + burst)]
        commands = [["qdisc", "add", "dev", device, "root", "handle", "1:", *bucket]]
        if self.delay_ms and delays:
            packets = 1000 + int(self.rate / 8 * self.delay_ms / 1000 / _MTU_BYTES)
            packets += self.queue_bytes // _MTU_BYTES
            delay = ["netem", "delay", f"{self.delay_ms / 2:g}ms", "limit", str(packets)]
            commands.append(
                ["qdisc", "add", "dev", device, "parent", "1:1", "handle", "2:", *delay]
            )
        return commands
